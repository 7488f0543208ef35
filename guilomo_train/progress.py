"""The progress line of a training: what runs, how far, how long still, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


class ProgressLine(ProgressCallback):
    """transformers' line with the stage before it, the last part of the trainer's `output_dir`
    (`search` or `finetune`), and the tokens per second of the last log line behind it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description_str(Path(args.output_dir).name)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        if self.training_bar is not None and logs is not None and "tokens_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['tokens_per_second']} tokens/s")
