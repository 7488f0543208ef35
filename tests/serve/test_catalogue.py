"""/v1/adapters: what it says, swaps without a seam, and what a killed server still knows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from guilomo_serve import cli
from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, read_spec
from guilomo_serve.catalogue import Catalogue, CatalogueError, Store, command, digest_of
from guilomo_serve.catalogue.database import CATALOGUE_FILE, hold
from tests.serve.helpers import (
    eventually,
    paused,
    random_adapter,
    stream,
    text_of,
    text_of_stream,
)

pytestmark = pytest.mark.slow

PROMPT = 4 * "A customer writes: my card has not arrived, it has been two weeks now!"
LENGTH = 220  # with the prompt nearly all that the server takes


def listed(server) -> dict[str, dict]:
    answer = server.admin("GET")
    assert answer.status_code == 200, answer.text
    return {entry["name"]: entry for entry in answer.json()["data"]}


def test_an_adapter_is_put_listed_and_described(opened, root):
    answer = opened.put("support", root / "first")
    assert answer.status_code == 200, answer.text
    parts = {part.partition(";")[0] for part in answer.headers["Server-Timing"].split(", ")}
    assert parts == {"digest", "copy", "check", "read", "wait", "catalogue"}
    spec = read_spec(root / "first")
    found = listed(opened)["support"]
    assert (found["experts"], found["rank"]) == (spec.total_experts, spec.total_rank)
    assert found["modules"] == len(spec.experts)
    assert found["per_module"]["rank"]["max"] == spec.max_total_rank
    assert found["bytes"] == (root / "first" / WEIGHTS_FILE).stat().st_size
    assert found["digest"] == digest_of(root / "first")
    assert found["base"] == spec.base_model_name_or_path
    assert found["task"] == "CAUSAL_LM"
    assert (found["resident"], found["in_flight"], found["error"]) == (True, 0, None)
    one = opened.admin("GET", "/support").json()
    assert one["allocation"] == {m: [e.rank for e in of] for m, of in spec.experts.items()}
    assert listed(opened)["given"]["kind"] == "lora"
    assert opened.admin("GET", "/nobody").status_code == 404
    before = found["last_used"]
    text_of(opened, "support", PROMPT)
    assert listed(opened)["support"]["last_used"] > before


def test_a_dry_run_checks_and_changes_nothing(opened, root, tiny_model, tmp_path):
    before = opened.admin("GET").json()
    answer = opened.put("dry", root / "first", dry_run=True).json()
    assert (answer["dry_run"], answer["version"]) == (True, None)
    assert opened.put("given", root / "first", dry_run=True).status_code == 200
    assert opened.admin("GET").json() == before
    with pytest.raises(openai.NotFoundError):
        text_of(opened, "dry", PROMPT)
    bad = random_adapter(tiny_model, root / "dry-bad", 4)
    (bad / WEIGHTS_FILE).write_bytes((bad / WEIGHTS_FILE).read_bytes()[:-1])
    assert opened.put("dry", bad, dry_run=True).status_code == 400
    wrong = opened.put("dry", root / "first", digest=digest_of(root / "second"))
    assert wrong.status_code == 400
    assert digest_of(root / "first") in wrong.json()["error"]["message"]


def test_a_swap_under_load_mixes_nothing_and_rolls_back(opened, root, adapters):
    """One name, one folder, other weights, and prompts whose blocks are all in the prefix cache."""
    folder = root / "swapped"
    shutil.copytree(adapters["first"], folder)
    version = opened.put("swapped", folder).json()["version"]
    # From the adapters under names of their own, with a cache of their own.
    opened.put("a", root / "first")
    opened.put("b", root / "second")
    old, new = (text_of(opened, name, PROMPT, LENGTH) for name in ("a", "b"))
    assert old != new
    assert text_of(opened, "swapped", PROMPT, LENGTH) == old

    shutil.copytree(adapters["second"], folder, dirs_exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        with paused(opened):
            streams = [stream(opened, "swapped", PROMPT, LENGTH) for _ in range(3)]
            eventually(lambda: opened.in_flight("swapped") == 3, "they run")
            swap = pool.submit(opened.put, "swapped", folder)
        answer = swap.result().json()
    after = text_of(opened, "swapped", PROMPT, LENGTH)
    for chunks in streams:
        assert text_of_stream(chunks) == old
    assert after == new
    assert answer["version"] > version
    assert answer["previous_version"] == version

    # Its folder is the new version's by now: the old one comes from the catalogue's copy.
    rolled = opened.admin("POST", "/swapped/rollback").json()
    assert rolled["version"] > answer["version"]
    assert rolled["digest"] == digest_of(adapters["first"])
    assert text_of(opened, "swapped", PROMPT, LENGTH) == old
    assert opened.admin("POST", "/given/rollback").status_code == 409


def test_a_failed_swap_leaves_the_old_version(opened, root, tiny_model):
    """One that is found bad before the engine sees it, and one that the engine refuses."""
    old, before = text_of(opened, "given", PROMPT), listed(opened)["given"]
    bad = random_adapter(tiny_model, root / "bad", 4)
    (bad / CONFIG_FILE).write_text("{}")
    plain = root / "bad-plain"
    shutil.copytree(root / "plain", plain)
    config = (plain / CONFIG_FILE).read_text()
    (plain / CONFIG_FILE).write_text(config.replace('"r": 8', '"r": 4'))
    for folder in (bad, plain):
        answer = opened.put("given", folder)
        assert answer.status_code == 400
        assert str(folder) in answer.json()["error"]["message"]
    assert listed(opened)["given"] | {"last_used": None} == before | {"last_used": None}
    assert text_of(opened, "given", PROMPT) == old


def test_a_member_of_the_root_is_served_when_asked_for(opened, root, tiny_model):
    random_adapter(tiny_model, root / "member", 8)
    assert "member" not in listed(opened)
    with ThreadPoolExecutor(3) as pool:  # at once: it is loaded once
        texts = set(pool.map(lambda _: text_of(opened, "member", PROMPT), range(3)))
    assert len(texts) == 1
    assert listed(opened)["member"]["resident"]
    opened.put("the-same", root / "member")
    assert texts == {text_of(opened, "the-same", PROMPT)}
    shutil.copytree(root / "member", root / "member-bad")
    (root / "member-bad" / WEIGHTS_FILE).unlink()
    with pytest.raises(openai.BadRequestError, match="file is missing"):
        text_of(opened, "member-bad", PROMPT)


def test_the_command_does_what_the_routes_do(opened, root, capsys):
    where = ("--url", opened.url)
    assert command.main(["put", "by-command", str(root / "first"), *where]) == 0
    assert command.main(["put", "by-command", str(root / "second"), *where]) == 0
    assert listed(opened)["by-command"]["digest"] == digest_of(root / "second")
    assert command.main(["rollback", "by-command", *where]) == 0
    assert listed(opened)["by-command"]["digest"] == digest_of(root / "first")
    capsys.readouterr()
    assert command.main(["ls", *where]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("by-command ")]
    assert digest_of(root / "first")[:12] in line
    assert command.main(["rm", "by-command", *where]) == 0
    assert "by-command" not in listed(opened)
    with pytest.raises(openai.NotFoundError):
        text_of(opened, "by-command", PROMPT)
    assert command.main(["rm", "by-command", *where]) == 1
    assert "by-command" in capsys.readouterr().err
    assert command.main(["ls", "--url", "http://127.0.0.1:9"]) == 1


def test_the_list_comes_in_pages(opened, root, capsys):
    for i in range(3):
        assert opened.put(f"page-{i}", root / "first").status_code == 200
    names, after, more = [], "page-", True
    while more and after < "page-3":
        page = opened.admin("GET", f"?limit=1&after={after}").json()
        names += [entry["name"] for entry in page["data"]]
        after, more = names[-1], page["has_more"]
    assert names[:3] == ["page-0", "page-1", "page-2"]
    last = opened.admin("GET", "?after=zzz").json()
    assert (last["data"], last["has_more"]) == ([], False)
    for wrong in ("limit=0", "limit=1001", "limit=x"):
        answer = opened.admin("GET", f"?{wrong}")
        assert answer.status_code == 400, answer.text
    capsys.readouterr()
    assert command.main(["ls", "--url", opened.url]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(listed(opened))


def test_one_server_has_a_catalogue(opened, state, tmp_path):
    with pytest.raises(CatalogueError, match="another server"):
        Catalogue(state / "catalogue.sqlite3")
    (tmp_path / "catalogue.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(CatalogueError, match="not a catalogue"):
        Catalogue(tmp_path / "catalogue.sqlite3")


def test_a_state_that_another_server_has_is_refused_before_a_model_is_looked_at(
    opened, state, tmp_path, capsys
):
    (tmp_path / CATALOGUE_FILE).write_bytes(b"no database" * 100)
    for folder, why in ((state, "another server"), (tmp_path, "not a catalogue")):
        assert cli.main(["/no/such/model", "--state", str(folder)]) == 2
        assert why in capsys.readouterr().err


def test_a_state_is_free_again_when_its_server_was_killed(tmp_path):
    holding = (
        "import pathlib, sys, time\n"
        "from guilomo_serve.catalogue.database import hold\n"
        "lock = hold(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", holding, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CatalogueError, match="another server"):
            hold(tmp_path)
        process.kill()
    hold(tmp_path).close()


def test_models_lists_what_can_be_asked_for(opened, root):
    """Members of the root that nobody has asked for yet, too."""
    (root / "no-adapter").mkdir()
    shutil.copytree(root / "first", root / "a name with spaces")
    (root / "leads-out").symlink_to("/etc")
    shutil.copytree(root / "first", root / "never-asked")
    found = {model.id: model for model in opened.client.models.list().data}
    members = {"first", "second", "plain", "never-asked"}
    assert found.keys() >= {"base"} | members | listed(opened).keys()
    assert not found.keys() & {"no-adapter", "a name with spaces", "leads-out"}
    assert found["never-asked"].parent == "base"
    assert "never-asked" not in listed(opened)
    for name in members:
        assert text_of(opened, name, PROMPT)


def test_as_many_members_are_listed_as_are_wanted(root, tmp_path):
    store = Store(tmp_path, [root])
    assert len(store.members(2)) == 2
    assert {"first", "second", "plain"} <= set(store.members(1000))


def test_a_killed_server_has_its_names_and_versions_again(opened, root, rollout, state, request):
    opened.put("given", root / "first")  # over what the command line gave
    opened.put("kept", root / "first")
    opened.put("kept", root / "second")
    opened.put("pinned", root / "first")
    assert opened.admin("POST", "/pinned/pin").json()["pinned"]
    opened.put("damaged", random_adapter_of(root, request))
    assert opened.admin("DELETE", "/member").status_code == 200
    before = listed(opened)
    texts = {name: text_of(opened, name, PROMPT) for name in ("kept", "pinned", "given")}
    weights = state / "adapters" / before["damaged"]["digest"] / WEIGHTS_FILE
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    shutil.copytree(root / "second", rollout, dirs_exist_ok=True)
    shutil.rmtree(root / "second")  # the catalogue has its own copy

    restarted = request.getfixturevalue("restarted")
    after = listed(restarted)
    # What the command line gave, the next one replaces.
    found, was = after.pop("rollout"), before.pop("rollout")
    assert found["digest"] == digest_of(rollout) != was["digest"]
    assert found["previous_version"] == was["version"]
    assert {n: (e["version"], e["digest"], e["pinned"]) for n, e in after.items()} == {
        n: (e["version"], e["digest"], e["pinned"]) for n, e in before.items()
    }
    # Weights come when they are asked for, but for those that are pinned or on the command line.
    assert {name for name, entry in after.items() if entry["resident"]} == {"pinned", "given"}
    for name, text in texts.items():
        assert text_of(restarted, name, PROMPT) == text
    with pytest.raises(openai.BadRequestError, match="has changed"):
        text_of(restarted, "damaged", PROMPT)
    assert "has changed" in listed(restarted)["damaged"]["error"]
    assert restarted.put("damaged", root / "first").status_code == 200  # and heals it
    assert listed(restarted)["damaged"]["error"] is None
    rolled = restarted.admin("POST", "/kept/rollback").json()
    assert rolled["digest"] == digest_of(root / "first")

    # What nobody asks for is evicted, and served again when asked for.
    eventually(lambda: not listed(restarted)["given"]["resident"], "an idle one is evicted", 40)
    assert listed(restarted)["pinned"]["resident"]
    assert text_of(restarted, "given", PROMPT) == texts["given"]
    assert listed(restarted)["given"]["version"] == before["given"]["version"]


def random_adapter_of(root, request):
    return random_adapter(request.getfixturevalue("tiny_model"), root / "to-damage", 9)
