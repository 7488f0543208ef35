"""What the demo reads of the logs of training and serving, for its lines of progress."""

from __future__ import annotations

from pathlib import Path

from demo.__main__ import SERVER_STEPS, messages, progress_of, starting
from demo.tasks import TASKS

TRAINING = [
    ("Loading weights: 100%|##| 272/272 [00:00<00:00]\n", (0, "loading the base")),
    ("\nsearch: 240 rows, online\n", (0, "search 0/24")),
    ("\rsearch:   4%|#  | 1/24 [00:02<00:50, 2.1s/it]", (1, "search 1/24")),
    ("\rsearch: 100%|###| 24/24 [00:50<00:00, 2.1s/it, 112 tokens/s]", (24, "search 24/24")),
    ("\nsearch took 55 s: a\nfine-tuning: 240 rows, 1.25 epochs\n", (24, "fine-tuning 0/75")),
    ("\rfinetune:   3%|#  | 2/75 [00:04<02:30, 2.1s/it]", (26, "fine-tuning 2/75")),
    ("\nfine-tuning took 150 s: a\nreport: a/report.md\n", (99, "done")),
]


def test_a_training_is_followed_by_its_log(tmp_path: Path) -> None:
    log = tmp_path / "task.log"
    text = ""
    for part, expected in TRAINING:
        text += part
        log.write_text(text)
        assert progress_of(log, [24, 75]) == expected


def test_a_start_is_followed_by_the_log_and_always_has_time_left(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("")
    seen = [starting(log, 3.0)]
    for logged, what, _ in SERVER_STEPS[1:]:
        with log.open("a") as file:
            file.write(f"INFO {logged} ...\n")
        line = starting(log, 30.0)
        assert what in line
        seen.append(line)
    assert seen[0] == "server: reading the command line; 3 s, about 37 s left"
    assert seen[1] == "server: starting the engine; 30 s, about 16 s left"
    assert seen[-1] == "server: opening its port; 30 s, about 10 s left"


def test_a_prompt_is_a_chat_that_says_first_what_is_asked_for() -> None:
    for task in TASKS:
        rows, questions = task.split(10, 5, seed=0)
        chats = [messages(row) for row in rows + questions]
        assert {chat[0]["role"] for chat in chats} == {"system"}
        assert len({chat[0]["content"] for chat in chats}) == 1
        assert [f"{chat[0]['content']}\n{chat[1]['content']}" for chat in chats] == [
            row["prompt"] for row in rows + questions
        ]
