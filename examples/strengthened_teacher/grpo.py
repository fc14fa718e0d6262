"""Trains a code model by TRL's GRPO on a reward that a program checks (see reward.py).

    python grpo.py FOLDER OUTPUT --steps 60       both are Hugging Face folders

Nothing here knows of this package or of Megatron: it stands for whatever makes a teacher better at
its domain. Needs TRL (``pip install trl``), in an environment of its own if you like.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import datasets
import reward
import transformers
import trl


def parsing_reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
) -> list[float]:
    """TRL's interface: a number for each completion. One that was cut off has all its tokens."""
    return [
        reward.reward(prompt, completion, ended=len(ids) < reward.COMPLETION_TOKENS)
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=0.02, help="weight of the KL to the start")
    arguments = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.folder)
    training, _ = reward.all_prompts(tokenizer)
    settings = trl.GRPOConfig(
        output_dir=str(arguments.output.with_suffix(".trainer")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=1234,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        beta=arguments.beta,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=reward.COMPLETION_TOKENS,
        temperature=1.0,
        top_k=0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=str(arguments.folder),
        reward_funcs=parsing_reward,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": training}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(arguments.output))


if __name__ == "__main__":
    main()
