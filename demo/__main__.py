"""`make demo`: trains two adapters, serves both beside their base, asks all three, swaps one.

1. starts `guilomo-serve` with the base alone; meanwhile writes the rows of two tasks
   (demo/tasks.py) under runs/demo/, and trains both at once: `guilomo-train run`, which is search,
   allocation, fine-tuning
2. puts both adapters into the server
3. asks base and adapters test questions through the openai client
4. swaps an adapter while a stream runs on it
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from tqdm import tqdm

from demo.tasks import TASKS, Row, Task, write_rows
from guilomo_serve.catalogue import keys

BASE = Path(".cache/smollm2-135m-instruct")
FOLDER = Path("runs/demo")
SEED = 0
TRAIN_ROWS, TEST_ROWS = 240, 20
# Chosen on rows of another seed. Small batches: more steps of the few rows.
SEARCH_EPOCHS, EPOCHS, BATCH_SIZE = 0.4, 1.25, 4
SHOWN_QUESTIONS = 4
AT_ONCE = 24  # questions; all 88 at once would answer none for a while, and then all
MAX_TOKENS = 32  # the longest answer of the two tasks has 30
STREAM_TOKENS = 96  # long enough that a swap falls into the stream
SERVER_START_S, SERVER_USUAL_S = 300, 40
# What vLLM logs while it starts, what comes after that, and the share of the start over by its end.
SERVER_STEPS = (
    ("", "reading the command line", 0.3),
    ("Using max model len", "starting the engine", 0.65),
    ("Starting to load model", "loading the base", 0.7),
    ("Loading weights took", "a first step to warm up", 0.9),
    ("init engine", "opening its port", 0.95),
)


def main() -> None:
    # `kill` ends the demo like Ctrl-C does: through the finally blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: terminated"))
    started = time.monotonic()
    say(f"1/4 Training: two adapters at once, search and fine-tuning on {TRAIN_ROWS} rows each")
    for task in TASKS:
        print(f"  {task.name}: {task.title}")
    questions = {task.name: write_data(task) for task in TASKS}
    with server() as served:
        train(served)
        say("2/4 Server: it has the base model; now it gets both adapters")
        wait_until_ready(served)
        client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        for task in TASKS:
            put(client, task.name, task)
        say(f"3/4 Questions: base and adapters answer {TEST_ROWS} test questions of each task")
        answers = ask_all(client, questions)
        show_answers(questions, answers)
        say("4/4 Swap: a new version of an adapter while a stream runs on the old one")
        swap_while_streaming(client, questions)
    say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes; all of it is in {FOLDER}/")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def adapter_folder(task: Task) -> Path:
    return FOLDER / task.name / "adapter"


def data_file(task: Task) -> Path:
    return FOLDER / f"{task.name}.jsonl"


def messages(row: Row) -> list[ChatCompletionMessageParam]:
    """A row's prompt as a chat: what is asked for, then the text that it is asked of. Without a
    system message the base's template would write one of its own, a quarter of the tokens."""
    asked, _, text = row["prompt"].partition("\n")
    return [{"role": "system", "content": asked}, {"role": "user", "content": text}]


def write_data(task: Task) -> list[Row]:
    """Writes the rows that a task is trained on and returns its test questions."""
    shutil.rmtree(FOLDER / task.name, ignore_errors=True)
    rows, questions = task.split(TRAIN_ROWS, TEST_ROWS, SEED)
    chats = [{"prompt": messages(row), "completion": row["completion"]} for row in rows]
    write_rows(chats, data_file(task))
    return questions


def train(served: Served) -> None:
    """Trains an adapter for each task, all at the same time with a part of the cores each: on a
    model as small as this, cores get more done with a process each than sharing one's work."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(TASKS))
    processes = {}
    try:
        for task in TASKS:
            command = [sibling("guilomo-train"), "run", "--base", str(BASE)]
            command += ["--train", str(data_file(task)), "--output", str(FOLDER / task.name)]
            command += ["--seed", str(SEED), "--save_steps", "0"]
            command += ["--search_epochs", str(SEARCH_EPOCHS), "--epochs", str(EPOCHS)]
            command += ["--search_batch_size", str(BATCH_SIZE), "--batch_size", str(BATCH_SIZE)]
            with log_file(task.name).open("w") as output:
                processes[task.name] = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )
        watch_training(processes, served)
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
    for task in TASKS:
        record = json.loads((FOLDER / task.name / "run.json").read_text())
        print(
            f"  {task.name}: searched for {record['search']['seconds']:.0f} s, fine-tuned for "
            f"{record['finetune_seconds']:.0f} s, {record['parameters'] / 1e6:.1f} million "
            f"parameters; {FOLDER / task.name / 'report.md'}"
        )


def watch_training(processes: dict[str, subprocess.Popen[bytes]], served: Served) -> None:
    """One line of progress until all processes have ended; the server has to live meanwhile."""
    steps = [math.ceil(TRAIN_ROWS * epochs / BATCH_SIZE) for epochs in (SEARCH_EPOCHS, EPOCHS)]
    with tqdm(total=len(processes) * sum(steps), unit="step", smoothing=0.1) as progress:
        while True:
            running = [process.poll() is None for process in processes.values()]
            found = {name: progress_of(log_file(name), steps) for name in processes}
            progress.set_postfix_str("; ".join(f"{n}: {what}" for n, (_, what) in found.items()))
            progress.update(sum(done for done, _ in found.values()) - progress.n)
            for name, process in processes.items():
                if process.poll():
                    fail(log_file(name), f"guilomo-train failed with status {process.returncode}")
            if served.process.poll() is not None:
                fail(served.log, "the server did not start")
            if not any(running):
                return
            time.sleep(1)


def progress_of(log: Path, steps: Sequence[int]) -> tuple[int, str]:
    """How many steps a training has done by its log, and what it does.

    Args:
        log: of `guilomo-train run`.
        steps: of the search and of the fine-tuning.
    """
    text = log.read_text(errors="replace")
    begun = [text.rfind(f"\n{stage}: ") for stage in ("search", "fine-tuning")]
    if "\nreport: " in text:
        return sum(steps), "done"
    if begun[0] < 0:
        return 0, "loading the base"
    stage = 1 if begun[1] > 0 else 0
    counts = re.findall(rf"\b(\d+)/{steps[stage]} \[", text[begun[stage] :])
    done = int(counts[-1]) if counts else 0
    before = sum(steps[:stage])
    return before + done, f"{('search', 'fine-tuning')[stage]} {done}/{steps[stage]}"


def log_file(name: str) -> Path:
    return FOLDER / f"{name}.log"


def fail(log: Path, why: str) -> None:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    sys.exit(f"{tail}\ndemo: {why}; the whole log is {log}")


def sibling(command: str) -> str:
    """The command that is installed beside this Python."""
    return str(Path(sys.executable).parent / command)


@dataclass(frozen=True)
class Served:
    """A server's process, which may be starting yet."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path


@contextmanager
def server() -> Iterator[Served]:
    """Runs `guilomo-serve` with the base for the length of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sibling("guilomo-serve"), str(BASE), "--served-model-name", "base"]
    command += ["--adapter-root", str(FOLDER), "--host", "127.0.0.1", "--port", str(port)]
    # vLLM wants nine tenths of the memory, which a desktop does not have free; training goes on.
    command += ["--gpu-memory-utilization", "0.4", "--kv-cache-memory-bytes", str(2**29)]
    command += ["--max-model-len", "1024"]
    # In half precision a token's rounding depends on how many are computed at once, so that a
    # stream would take another word for a near tie whenever a second request runs beside it.
    command += ["--dtype", "float32"]
    log = log_file("server")
    with log.open("w") as output:
        # Its own session: Ctrl-C comes to the demo alone, which then stops the server in order.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Served(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(served: Served) -> None:
    started = time.monotonic()
    with tqdm(total=1.0, bar_format="{desc}") as progress:
        while served.process.poll() is None and time.monotonic() - started < SERVER_START_S:
            try:
                urllib.request.urlopen(f"{served.url}/health", timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                progress.set_description_str(starting(served.log, time.monotonic() - started))
                time.sleep(1)
    fail(served.log, "the server did not start")


def starting(log: Path, seconds: float) -> str:
    """What a server does that has been starting for so long, by its log, and how long it will."""
    text = log.read_text(errors="replace")
    _, what, over = next(step for step in reversed(SERVER_STEPS) if step[0] in text)
    whole = max(SERVER_USUAL_S, seconds / over)
    return f"server: {what}; {seconds:.0f} s, about {whole - seconds:.0f} s left"


def ask(client: OpenAI, model: str, row: Row) -> str:
    answer = client.chat.completions.create(
        model=model, messages=messages(row), max_tokens=MAX_TOKENS, temperature=0
    )
    return (answer.choices[0].message.content or "").strip()


def ask_all(
    client: OpenAI, questions: dict[str, list[Row]]
) -> dict[str, dict[str, dict[str, str]]]:
    """Answers: task -> model -> prompt -> answer.

    The base and a task's adapter answer all of its questions, the other adapter those that are
    shown.
    """
    jobs = [
        (task, model, row)
        for task, rows in questions.items()
        for model in ("base", *questions)
        for row in (rows if model in ("base", task) else rows[:SHOWN_QUESTIONS])
    ]
    answers: dict[str, dict[str, dict[str, str]]] = {
        task: {model: {} for model in ("base", *questions)} for task in questions
    }
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        asked = {
            pool.submit(ask, client, model, row): (task, model, row) for task, model, row in jobs
        }
        for future in tqdm(as_completed(asked), total=len(jobs), desc="answers", unit="answer"):
            task, model, row = asked[future]
            answers[task][model][row["prompt"]] = future.result()
    (FOLDER / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")
    return answers


def show_answers(
    questions: dict[str, list[Row]], answers: dict[str, dict[str, dict[str, str]]]
) -> None:
    """Some answers side by side, then exact match of the base and of each task's adapter."""
    for task, rows in questions.items():
        print(f"\nQuestions of {task} (the first {SHOWN_QUESTIONS} of {TEST_ROWS})")
        for row in rows[:SHOWN_QUESTIONS]:
            print(f"\n  {row['prompt'].splitlines()[-1]}")
            print(f"    {'expected':<10}   {row['completion']}")
            for model, by_prompt in answers[task].items():
                found = by_prompt[row["prompt"]]
                mark = "=" if found == row["completion"] else " "
                print(f"    {model:<10} {mark} {shortened(found)}")
    print(f"\n{'Exact match':<22}{'base':>12}{'its adapter':>14}")
    for task, rows in questions.items():
        hits = [
            sum(answers[task][model][row["prompt"]] == row["completion"] for row in rows)
            for model in ("base", task)
        ]
        cells = [f"{number} of {TEST_ROWS}" for number in hits]
        print(f"{task + ' questions':<22}{cells[0]:>12}{cells[1]:>14}")


def shortened(text: str) -> str:
    line = " / ".join(text.splitlines())
    return line if len(line) <= 90 else line[:87] + "..."


def swap_while_streaming(client: OpenAI, questions: dict[str, list[Row]]) -> None:
    """Gives the first adapter's name to the second one's weights and back, under a stream."""
    first, second = TASKS
    row = questions[first.name][0]
    undisturbed = "".join(stream(client, first.name, row))
    parts = []
    for part in stream(client, first.name, row):
        parts.append(part)
        if len(parts) == 10:
            put(client, first.name, second)
            show_one(client, first.name, questions[second.name][0], "asked meanwhile")
            at_swap = len(parts)
    kept = "the same text as" if "".join(parts) == undisturbed else "ANOTHER text than"
    print(f"  the running stream went on: {at_swap} parts before the swap, {len(parts)} in all,")
    print(f"  {kept} without a swap: {shortened(undisturbed)}")
    put(client, first.name, first)
    show_one(client, first.name, row, "after swapping back")


def stream(client: OpenAI, model: str, row: Row) -> Iterator[str]:
    chunks = client.chat.completions.create(
        model=model,
        messages=messages(row),
        max_tokens=STREAM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return (chunk.choices[0].delta.content or "" for chunk in chunks)


def put(client: OpenAI, name: str, task: Task) -> None:
    """Gives a name the adapter that a task has."""
    folder = adapter_folder(task)
    started = time.monotonic()
    key = {"Authorization": f"Bearer {keys.find(str(client.base_url))}"}
    source = {"source": str(folder.relative_to(FOLDER))}
    client.put(f"/adapters/{name}", body=source, cast_to=object, options={"headers": key})
    print(f"  {name} now has the weights of {folder} ({time.monotonic() - started:.2f} s)")


def show_one(client: OpenAI, model: str, row: Row, when: str) -> None:
    print(f"  {when}, {model} answers: {shortened(ask(client, model, row))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
