"""Loss and gradients of TRL's DPOTrainer on a tiny random model, kept for the tests.

    <python with trl> -m tests.harness.trl_dpo tests/unit/losses/trl_dpo.safetensors

Nothing here is imported by the tests, which need no TRL: the file has the states and heads of
student and reference, the pairs, and what TRL 1.16.0 makes of them.
"""

from __future__ import annotations

import sys
import tempfile

BETA = 0.3
PAIRS = (
    ("a b c", " d e f g", " h i"),
    ("j k", " l", " m n o p q"),
    ("r s t u v", " w x", " y z a"),
)
KINDS = {"sum": "sigmoid", "mean": "sigmoid_norm"}


def main(path: str) -> None:
    """Write the file."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl
    from safetensors.torch import save_file

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, tie_word_embeddings=False,
        initializer_range=0.5,
    )  # fmt: skip
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    saved: dict[str, torch.Tensor] = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        student = transformers.LlamaForCausalLM(config).float()
        reference = transformers.LlamaForCausalLM(config).float()
        with tempfile.TemporaryDirectory() as folder:
            args = trl.DPOConfig(
                output_dir=folder, beta=BETA, loss_type=[kind], use_cpu=True, report_to=[],
                per_device_train_batch_size=len(PAIRS), gradient_checkpointing=False, bf16=False,
            )  # fmt: skip
            trainer = trl.DPOTrainer(
                student, reference, args=args, train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )  # fmt: skip
            states = {}
            for who, model in (("student", trainer.model), ("reference", trainer.ref_model)):

                def keep(_module, _args, output, who=who, states=states):
                    states[who] = output[0]
                    if output[0].requires_grad:
                        output[0].retain_grad()

                model.model.register_forward_hook(keep)
            batch = next(iter(trainer.get_train_dataloader()))
            trainer.model.train()
            loss = trainer._compute_loss(trainer.model, batch, False)
            loss.backward()
            metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        saved |= {
            "input_ids": batch["input_ids"],
            "completion_mask": batch["completion_mask"],
            "student": states["student"],
            "reference": states["reference"],
            "head": trainer.model.lm_head.weight,
            "reference_head": trainer.ref_model.lm_head.weight,
            f"{name} loss": loss,
            f"{name} hidden gradient": states["student"].grad,
            f"{name} head gradient": trainer.model.lm_head.weight.grad,
        }
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            saved[f"{name} {key}"] = torch.tensor(metrics[key])
    plain = {key: value.detach().clone().contiguous() for key, value in saved.items()}
    save_file(plain, path, metadata={"trl": trl.__version__, "beta": str(BETA)})


if __name__ == "__main__":
    main(*sys.argv[1:])
