"""`make demo`: trains two adapters, serves both beside their base, asks all three, swaps one.

1. writes the rows of two tasks (demo/tasks.py) under runs/demo/
2. `guilomo-train run` for each: search, allocation, fine-tuning
3. `guilomo-serve` with both adapters
4. asks base and adapters the same test questions through the openai client
5. swaps an adapter while a stream runs on it
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from tqdm import tqdm

from demo.tasks import TASKS, Row, Task, write_rows
from guilomo_serve.catalogue import keys

BASE = Path(".cache/smollm2-135m-instruct")
FOLDER = Path("runs/demo")
SEED = 0
TRAIN_ROWS, TEST_ROWS = 240, 20
# About five minutes a task on two cores without AVX-512. Small batches: more steps of the few rows.
SEARCH_EPOCHS, EPOCHS, BATCH_SIZE = 0.4, 1.25, 4
SHOWN_QUESTIONS = 4
MAX_TOKENS = 32  # the longest answer of the two tasks has 30
STREAM_TOKENS = 160  # long enough that a swap falls into the stream
SERVER_START_S = 300


def main() -> None:
    # `kill` ends the demo like Ctrl-C does: through the finally blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: terminated"))
    started = time.monotonic()
    questions = {}
    for step, task in enumerate(TASKS, 1):
        say(f"{step}/5 {task.name}: {task.title}. Search and fine-tuning on {TRAIN_ROWS} rows")
        questions[task.name] = train(task)
    say("3/5 Server: the base model and both adapters in one process")
    with server() as client:
        say("4/5 Questions: base and adapters answer the same test questions")
        answers = ask_all(client, [row for rows in questions.values() for row in rows])
        show_answers(questions, answers)
        say("5/5 Swap: a new version of an adapter while a stream runs on the old one")
        swap_while_streaming(client, questions)
    say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes; all of it is in {FOLDER}/")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def adapter_folder(task: Task) -> Path:
    return FOLDER / task.name / "adapter"


def train(task: Task) -> list[Row]:
    """Trains the task's adapter and returns its test questions."""
    folder = FOLDER / task.name
    shutil.rmtree(folder, ignore_errors=True)
    rows, questions = task.split(TRAIN_ROWS, TEST_ROWS, SEED)
    data = FOLDER / f"{task.name}.jsonl"
    write_rows(rows, data)
    command = [sibling("guilomo-train"), "run", "--base", BASE, "--train", data]
    command += ["--output", folder, "--seed", str(SEED)]
    command += ["--search_epochs", str(SEARCH_EPOCHS), "--epochs", str(EPOCHS)]
    command += ["--batch_size", str(BATCH_SIZE)]
    subprocess.run(command, check=True)
    return questions


def sibling(command: str) -> str:
    """The command that is installed beside this Python."""
    return str(Path(sys.executable).parent / command)


@contextmanager
def server() -> Iterator[OpenAI]:
    """Runs `guilomo-serve` with both adapters for the length of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sibling("guilomo-serve"), str(BASE), "--served-model-name", "base"]
    for task in TASKS:
        command += ["--adapter", f"{task.name}={adapter_folder(task)}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    # vLLM wants nine tenths of the memory, which a desktop does not have free.
    command += ["--gpu-memory-utilization", "0.4"]
    # In half precision a token's rounding depends on how many are computed at once, so that a
    # stream would take another word for a near tie whenever a second request runs beside it.
    command += ["--dtype", "float32"]
    log = FOLDER / "server.log"
    with log.open("w") as output:
        # Its own session: Ctrl-C comes to the demo alone, which then stops the server in order.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    bar = "waiting for the server: {elapsed}"
    with tqdm(total=SERVER_START_S, bar_format=bar) as progress:
        for _ in range(SERVER_START_S):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(health, timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
                progress.update()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    sys.exit(f"{tail}\ndemo: the server did not start; the whole log is {log}")


def ask(client: OpenAI, model: str, prompt: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=MAX_TOKENS,
        temperature=0,
    )
    return (answer.choices[0].message.content or "").strip()


def ask_all(client: OpenAI, rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Answers of every model to every question: model -> prompt -> answer."""
    models = ["base", *(task.name for task in TASKS)]
    jobs = [(model, row["prompt"]) for row in rows for model in models]
    answers: dict[str, dict[str, str]] = {model: {} for model in models}
    with ThreadPoolExecutor(max_workers=12) as pool:
        texts = pool.map(lambda job: ask(client, *job), jobs)
        for (model, prompt), text in zip(jobs, tqdm(texts, total=len(jobs)), strict=True):
            answers[model][prompt] = text
    (FOLDER / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")
    return answers


def show_answers(questions: dict[str, list[Row]], answers: dict[str, dict[str, str]]) -> None:
    """Some answers side by side, then exact match of each model on each task."""
    for task in TASKS:
        print(f"\nQuestions of {task.name} (the first {SHOWN_QUESTIONS} of {TEST_ROWS})")
        for row in questions[task.name][:SHOWN_QUESTIONS]:
            print(f"\n  {row['prompt'].splitlines()[-1]}")
            print(f"    {'expected':<10}   {row['completion']}")
            for model, by_prompt in answers.items():
                found = by_prompt[row["prompt"]]
                mark = "=" if found == row["completion"] else " "
                print(f"    {model:<10} {mark} {shortened(found)}")
    print(f"\n{'Exact match':<22}" + "".join(f"{model:>12}" for model in answers))
    for task in TASKS:
        cells = ""
        for by_prompt in answers.values():
            hits = sum(by_prompt[r["prompt"]] == r["completion"] for r in questions[task.name])
            cells += f"{f'{hits} of {TEST_ROWS}':>12}"
        print(f"{task.name + ' questions':<22}{cells}")


def shortened(text: str) -> str:
    line = " / ".join(text.splitlines())
    return line if len(line) <= 90 else line[:87] + "..."


def swap_while_streaming(client: OpenAI, questions: dict[str, list[Row]]) -> None:
    """Gives the first adapter's name to the second one's weights and back, under a stream."""
    first, second = TASKS
    row = questions[first.name][0]
    undisturbed = "".join(stream(client, first.name, row["prompt"]))
    parts = []
    for part in stream(client, first.name, row["prompt"]):
        parts.append(part)
        if len(parts) == 10:
            load(client, first.name, adapter_folder(second))
            show_one(client, first.name, questions[second.name][0], "asked meanwhile")
            at_swap = len(parts)
    kept = "the same text as" if "".join(parts) == undisturbed else "ANOTHER text than"
    print(f"  the running stream went on: {at_swap} parts before the swap, {len(parts)} in all,")
    print(f"  {kept} without a swap: {shortened(undisturbed)}")
    load(client, first.name, adapter_folder(first))
    show_one(client, first.name, row, "after swapping back")


def stream(client: OpenAI, model: str, prompt: str) -> Iterator[str]:
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=STREAM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return (chunk.choices[0].delta.content or "" for chunk in chunks)


def load(client: OpenAI, name: str, folder: Path) -> None:
    body = {"lora_name": name, "lora_path": str(folder.resolve()), "load_inplace": True}
    started = time.monotonic()
    key = {"Authorization": f"Bearer {keys.find(str(client.base_url))}"}
    client.post("/load_lora_adapter", body=body, cast_to=str, options={"headers": key})
    print(f"  {name} now has the weights of {folder} ({time.monotonic() - started:.2f} s)")


def show_one(client: OpenAI, model: str, row: Row, when: str) -> None:
    print(f"  {when}, {model} answers: {shortened(ask(client, model, row['prompt']))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
    except subprocess.CalledProcessError as e:
        sys.exit(f"demo: {Path(e.cmd[0]).name} failed with status {e.returncode}")
