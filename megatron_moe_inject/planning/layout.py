"""How the ranks of a job are laid out: which pipeline stage, experts and shard each rank has.

The order is Megatron's (``parallel_state.RankGenerator``): tensor, context, (expert,) data and
pipeline parallelism from the fastest, the last two exchanged under ``--use-tp-pp-dp-mapping``.
Arithmetic on whole numbers; a test compares it with the groups that Megatron makes.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass

from megatron_moe_inject.host.errors import RecipeError


@dataclass(frozen=True)
class Place:
    """Where a rank stands, each a coordinate in one direction.

    Attributes:
        dp: in the group that holds the same dense parameters, context parallelism aside.
        edp: the same of an expert's parameter.
    """

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of a job's parallel layout.

    Attributes:
        gpus: ranks of the job.
        vpp: model chunks of each pipeline rank.
        pp_before_dp: pipeline ranks are nearer than data-parallel ones.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp_before_dp: bool = False

    @classmethod
    def of_args(cls, args: Namespace, gpus: int) -> Layout:
        """Of Megatron's arguments, validated.

        Raises:
            RecipeError: the number of GPUs cannot be laid out so.
        """
        layout = cls(
            gpus,
            tp=args.tensor_model_parallel_size,
            pp=args.pipeline_model_parallel_size,
            vpp=args.virtual_pipeline_model_parallel_size or 1,
            cp=args.context_parallel_size,
            ep=args.expert_model_parallel_size,
            etp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
            pp_before_dp=bool(args.use_tp_pp_dp_mapping),
        )
        layout.check(bool(args.num_experts))
        return layout

    def check(self, experts: bool = True) -> None:
        """Raise ``RecipeError`` unless the ranks divide evenly in both directions."""
        dense = {"TP": self.tp, "CP": self.cp, "PP": self.pp}
        sparse = {"ETP": self.etp, "EP": self.ep, "PP": self.pp}
        for sizes in (dense, sparse) if experts else (dense,):
            product = 1
            for size in sizes.values():
                product *= size
            if self.gpus % product:
                text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
                below = self.gpus // product * product
                near = [str(n) for n in (below, below + product) if n]
                raise RecipeError(
                    f"--gpus: {self.gpus} is no multiple of {text} = {product}; give "
                    f"{' or '.join(near)}, or another layout"
                )

    @property
    def dp(self) -> int:
        """Ranks that hold the same dense parameters, context parallelism aside."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def dp_cp(self) -> int:
        """Ranks over which a dense parameter's optimizer state is sharded."""
        return self.dp * self.cp

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        inside, block = self.gpus // self.pp, rank
        if self.pp_before_dp:
            near = self.tp * self.cp
            block, dp = rank % (near * self.pp), rank // (near * self.pp)
            pp, block = block // near, block % near + dp * near
        else:
            pp, block = rank // inside, rank % inside
        return Place(
            rank,
            tp=block % self.tp,
            cp=block // self.tp % self.cp,
            dp=block // (self.tp * self.cp),
            pp=pp,
            etp=block % self.etp,
            ep=block // self.etp % self.ep,
            edp=block // (self.etp * self.ep),
        )

    def first_rank(self, pp: int) -> int:
        """The first rank of a pipeline stage."""
        return pp * (self.tp * self.cp if self.pp_before_dp else self.gpus // self.pp)

    def text(self) -> str:
        """As flags' short names, sizes of 1 left out."""
        names = {"tp": "TP", "pp": "PP", "vpp": "VPP", "cp": "CP", "ep": "EP", "etp": "ETP"}
        sizes = {name: value for name, value in asdict(self).items() if name in names and value > 1}
        if self.etp == self.tp:
            sizes.pop("etp", None)
        elif self.etp == 1 and self.ep > 1:
            sizes["etp"] = 1
        return (
            " ".join(f"{names[name]}={value}" for name, value in sizes.items()) or "data parallel"
        )
