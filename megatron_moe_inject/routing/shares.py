"""Where tokens go, in Megatron's log: shares of domain and general tokens on the target experts.

The sums of ``RoutingWatch`` give, every step, means over the layers that have targets; they are
reported beside the loss terms, so Megatron averages them over the log interval and writes them to
its log line, TensorBoard and W&B. Every ``detail_every`` steps each layer is written by itself,
with what is no mean: the spread over experts, and experts that nobody uses.

Shapes: n micro-batches, b samples, D domains, C = D + 1 classes (general data first), L MoE
layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host.attached_loss import (
    add_reports,
    sum_and_count,
)
from megatron_moe_inject.host.labels import GENERAL
from megatron_moe_inject.host.routing_watch import (
    SUMS,
    RoutingWatch,
)
from megatron_moe_inject.host.to_device import to_device

NEW_SHARE = "new share"
"""Share of a class's choices that go to new experts, in the layers that got some."""
Write = Callable[[Mapping[str, float], int], None]
"""Gets scalars by name and the iteration."""


class RoutingShares:
    """Reports of one rank.

    Args:
        watch: the sums.
        domains: names by domain index.
        targets: by global layer, bool ``[C, E]``, none in row 0.
        new: by global layer, bool ``[E]``: new experts, of which the share of each class is told.
        groups: the student's ``ProcessGroupCollection``.
        drops: also report dropped choices.
        detail_every: steps between details by layer; 0 = never.
        write: gets the details, on every rank.
    """

    def __init__(
        self,
        watch: RoutingWatch,
        domains: Sequence[str],
        targets: Mapping[int, torch.Tensor],
        new: Mapping[int, torch.Tensor],
        groups: Any,
        *,
        device: torch.device,
        drops: bool,
        detail_every: int,
        write: Write,
    ) -> None:
        self._watch = watch
        self._domains = domains
        self._groups = groups
        self._device = device
        self._drops = drops
        self._detail_every = detail_every
        self._write = write
        self._steered = sorted(
            {i - 1 for mask in targets.values() for i in mask.any(1).nonzero().flatten().tolist()}
        )
        self._classes = ["general", *domains]
        experts = next(iter([*targets.values(), *new.values()])).shape[-1]
        of_layers = _stacked(targets, watch.layers, (len(self._classes), experts))
        self._targets = of_layers.transpose(0, 1).to(device)
        self._has_new = bool(new)
        self._new = _stacked(new, watch.layers, (experts,)).to(device)

    def begin(self, labels: torch.Tensor, loss_mask: torch.Tensor | None = None) -> None:
        """Watch the step whose micro-batches have these labels, ``[n, b]`` on the host, and this
        ``Step.loss_mask``."""
        self._labels = labels
        self._watch.begin(labels.shape[0], labels.shape[1], loss_mask)

    def end(self, reports: Any, iteration: int | None) -> None:
        """Add the step's shares to what the schedule returned, and write details when it is time.

        Args:
            reports: see ``add_reports``.
            iteration: number of the step that ended; ``None`` in evaluation.

        Collectives: those of ``RoutingWatch.end``, one all-reduce of a few numbers over the
        pipeline group, and with details those of ``_detail``.
        """
        sums = self._watch.end()
        classes = len(self._domains) + 1
        by_class = sums.new_zeros(len(SUMS), classes, *sums.shape[2:])
        flat = self._labels.flatten()
        text = (flat >= GENERAL).nonzero().flatten()  # pairs of answers are of no class
        label = to_device(flat[text] + 1, self._device)
        by_class.index_add_(1, label, sums[:, to_device(text, self._device)])
        values = [self._of_domain(domain, by_class) for domain in self._steered]
        named = {
            f"{name}/{self._domains[domain]}": pair
            for domain, of_domain in zip(self._steered, values, strict=True)
            for name, pair in of_domain.items()
        }
        if self._has_new:
            layers = self._new.any(-1, keepdim=True)
            for name, chosen in zip(self._classes, by_class[0], strict=True):
                pair = torch.stack([(chosen * self._new).sum(), (chosen * layers).sum()])
                named[f"{NEW_SHARE}/{name}"] = pair
        table = torch.stack(list(named.values()))
        if self._groups.pp.size() > 1:
            dist.all_reduce(table, group=self._groups.pp)
        add_reports(reports, {n: sum_and_count(*p) for n, p in zip(named, table, strict=True)})
        if iteration is not None and self._detail_every and iteration % self._detail_every == 0:
            self._detail(by_class, iteration)

    def _of_domain(self, domain: int, by_class: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[2]`` sums by name: on the targets, and overall in the layers that have targets."""
        targets = self._targets[domain + 1]
        layers = targets.any(-1, keepdim=True)
        chosen, gates, probs, dropped = by_class[:, domain + 1]
        general = by_class[0, 0]

        def share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
            return torch.stack([(part * targets).sum(), (whole * layers).sum()])

        values = {
            "target share": share(chosen, chosen),
            "target gates": share(gates, gates),
            "target mass": share(probs, probs),
            "general on targets": share(general, general),
        }
        if self._drops:
            on_targets = (chosen * targets).sum()
            values["dropped on targets"] = torch.stack([(dropped * targets).sum(), on_targets])
        return values

    def _detail(self, by_class: torch.Tensor, iteration: int) -> None:
        """Write every layer of the whole model.

        Collectives: one all-reduce of C L E numbers three times over the data-parallel group, and
        one all-gather over the pipeline group.
        """
        whole = by_class.clone()
        if self._groups.dp.size() > 1:
            dist.all_reduce(whole, group=self._groups.dp)
        local = self._watch.layers, whole.cpu(), self._targets.cpu()
        stages: list[Any] = [None] * self._groups.pp.size()
        dist.all_gather_object(stages, local, group=self._groups.pp)
        scalars: dict[str, float] = {}
        for layers, sums, targets in stages:
            for place, layer in enumerate(layers):
                for domain in self._steered:
                    if not targets[domain + 1, place].any():
                        continue
                    shares = layer_shares(sums[:, :, place], targets[domain + 1, place], domain + 1)
                    for name, value in shares.items():
                        scalars[f"inject-routing/{self._domains[domain]}/{name}/{layer}"] = value
        self._write(scalars, iteration)


def layer_shares(sums: torch.Tensor, targets: torch.Tensor, index: int) -> dict[str, float]:
    """How one layer treats one domain, from the sums of a step.

    Args:
        sums: ``[4, C, E]``, see ``SUMS``.
        targets: bool ``[E]``, some of them.
        index: the domain's class.

    Returns:
        ``target share``, ``target gates``, ``target mass`` and ``general on targets``: shares of
        choices, gate weights, probabilities and general choices; each is left out where there were
        none, as in a step without a sample of the domain. ``balance within`` and ``balance
        outside``: entropy of all tokens' choices over the experts of the set and over the others,
        in units of its maximum. ``dead within``, ``dead outside``: experts that nobody chose.
        ``entropy``: that of the domain's mean distribution, in nats.
    """
    chosen, gates, probs, dropped = sums[:, index].double()
    general, everybody = sums[0, 0].double(), sums[0].double().sum(0)
    values = {
        **_share("target share", chosen, targets),
        **_share("target gates", gates, targets),
        **_share("target mass", probs, targets),
        **_share("general on targets", general, targets),
        "balance within": _evenness(everybody[targets]),
        "balance outside": _evenness(everybody[~targets]),
        "dead within": float((everybody[targets] == 0).sum()),
        "dead outside": float((everybody[~targets] == 0).sum()),
    }
    if probs.any():
        values["entropy"] = float(torch.special.entr(probs / probs.sum()).sum())
    if dropped.any():
        values["dropped on targets"] = float((dropped * targets).sum()) / max(
            float((chosen * targets).sum()), 1.0
        )
    return values


def _stacked(
    masks: Mapping[int, torch.Tensor], layers: Sequence[int], shape: tuple[int, ...]
) -> torch.Tensor:
    """Bool ``[L, *shape]`` of a rank's layers, nothing where a layer has no mask."""
    nothing = torch.zeros(shape, dtype=torch.bool)
    rows = [masks.get(layer, nothing) for layer in layers]
    return torch.stack(rows) if rows else nothing.new_zeros(0, *shape)


def _share(name: str, values: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    whole = float(values.sum())
    return {name: float((values * targets).sum()) / whole} if whole else {}


def _evenness(counts: torch.Tensor) -> float:
    if len(counts) < 2 or not counts.any():
        return 1.0
    entropy = torch.special.entr(counts / counts.sum()).sum()
    return float(entropy / torch.log(torch.tensor(float(len(counts)))))
