"""Models of the Hub: through the real huggingface_hub, with a cache made here and a Hub that runs here."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from sfumato.checkpoint.hub import choose, is_hub_id
from sfumato.errors import CheckpointError

COMMIT, OLDER = "a" * 40, "b" * 40
STEM = "diffusion_pytorch_model"


def weights(name: str = "a") -> bytes:
    text = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": [None, None],
}
SHARDS = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
MODEL: dict[str, bytes] = {
    "model_index.json": json.dumps(INDEX).encode(),
    "README.md": b"# a model",
    "pipeline.py": b"raise SystemExit",
    "everything.safetensors": weights(),
    "everything.ckpt": b"\x80\x02",
    "unet/config.json": b"{}",
    f"unet/{STEM}.safetensors": weights(),
    f"unet/{STEM}.fp16.safetensors": weights(),
    f"unet/{STEM}.non_ema.safetensors": weights(),
    f"unet/{STEM}.bin": b"\x80\x02",
    "unet/code.py": b"raise SystemExit",
    "vae/config.json": b"{}",
    f"vae/{STEM}.safetensors.index.json": json.dumps(
        {"weight_map": dict(zip("ab", SHARDS, strict=True))}
    ).encode(),
    f"vae/{SHARDS[0]}": weights("a"),
    f"vae/{SHARDS[1]}": weights("b"),
    f"vae/{STEM}.fp16.safetensors": weights(),
    "vae_old/config.json": b"{}",
    f"vae_old/{STEM}.safetensors": weights(),
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"#version",
    "tokenizer/spiece.model": b"x",
    "tokenizer/tokenizer.pkl": b"\x80\x02",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": weights(),
}
PLAIN = {
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
}
NEEDED = PLAIN | {
    f"unet/{STEM}.safetensors",
    f"vae/{STEM}.safetensors.index.json",
    f"vae/{SHARDS[0]}",
    f"vae/{SHARDS[1]}",
}
SAFETY = {"safety_checker/config.json", "safety_checker/model.safetensors"}


# --- which files -------------------------------------------------------------------------------------------------


def test_a_model_needs_the_files_of_its_parts_in_one_variant():
    parts = ["unet", "vae", "tokenizer"]
    assert set(choose(MODEL, parts, None, "m")) == NEEDED
    halves = {f"{part}/{STEM}.fp16.safetensors" for part in ("unet", "vae")}
    assert set(choose(MODEL, parts, "fp16", "m")) == PLAIN | halves
    with pytest.raises(
        CheckpointError, match=r"m, vae, holds no .* of variant 'non_ema'; there is the plain one, 'fp16'"
    ):
        choose(MODEL, parts, "non_ema", "m")


def test_a_part_with_pickles_alone_is_refused():
    with pytest.raises(CheckpointError, match=r"m, unet, holds only pickled weights"):
        choose(["model_index.json", "unet/config.json", f"unet/{STEM}.bin"], ["unet"], None, "m")
    with pytest.raises(CheckpointError, match="m holds only pickled weights"):
        choose(["model.ckpt", "README.md"], None, None, "m")
    with pytest.raises(CheckpointError, match="m holds no"):
        choose(["README.md"], None, None, "m")


def test_a_repository_of_one_part_or_of_one_file():
    vae = ["config.json", f"{STEM}.safetensors", f"{STEM}.bin", "sdxl_vae.safetensors", "README.md"]
    assert set(choose(vae, None, None, "m")) == {"config.json", f"{STEM}.safetensors"}
    assert choose(["dream.safetensors", "README.md", "dream.ckpt"], None, None, "m") == ["dream.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"several models: a\.safetensors, b\.safetensors; .*hf download m NAME"
    ):
        choose(["a.safetensors", "b.safetensors"], None, None, "m")


@pytest.mark.parametrize(
    "name, fits",
    [
        ("org/name", True),
        ("a1/b-c_d.e@v1.0", True),
        ("org/name@refs/pr/3", True),
        ("org/name@" + COMMIT, True),
        ("name", False),
        ("org/name/file", False),
        ("../name", False),
        ("org/..", False),
        ("/org/name", False),
        ("org/name@", False),
        ("org/name@../x", False),
        ("org--x/name", False),
        ("https://huggingface.co/org/name", False),
        ("org/na me", False),
        ("org/name\n", False),
        ("org/" + "n" * 200, False),
        ("", False),
    ],
)
def test_what_is_a_name_of_the_hub(name, fits):
    assert is_hub_id(name) is fits


# --- a cache made here, and no network -----------------------------------------------------------------------------

FETCH = """
import json, sys
from sfumato.checkpoint.hub import fetch
from sfumato.errors import InputError
try:
    answer = {"path": str(fetch(**json.loads(sys.argv[1])))}
except InputError as error:
    answer = {"error": str(error)}
assert "torch" not in sys.modules
print(json.dumps(answer))
"""


def environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "XDG_"))}
    return (
        kept
        | {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
        | more
    )


def fetched(
    cache: Path, name: str = "org/name", env: dict[str, str] | None = None, **options
) -> dict[str, str]:
    env = environment(cache, **(env if env is not None else {"HF_HUB_OFFLINE": "1"}))
    arguments = json.dumps({"name": name, "skip": ["safety_checker"], **options})
    done = subprocess.run([sys.executable, "-c", FETCH, arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "\n" not in answer.get("error", "")
    return answer


def put(cache: Path, files: dict[str, bytes], commit: str = COMMIT, ref: str | None = "main") -> Path:
    """The documented layout: blobs, links to them by commit, and refs."""
    folder = cache / "models--org--name"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = folder / "snapshots" / commit
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_offline_the_cached_commit_is_used(cache):
    snapshot = put(cache, {name: MODEL[name] for name in NEEDED})
    assert fetched(cache) == {"path": str(snapshot)}
    assert names(cache.parent / "home") == set()


def test_offline_a_revision_is_a_name_or_a_commit(cache):
    files = {name: MODEL[name] for name in NEEDED}
    new, old = put(cache, files), put(cache, files, OLDER, "v1/stable")
    assert fetched(cache) == {"path": str(new)}
    assert fetched(cache, "org/name@v1/stable") == fetched(cache, f"org/name@{OLDER}") == {"path": str(old)}
    error = fetched(cache, "org/name@v2")["error"]
    assert "org/name@v2 is not in the cache" in error
    assert "HF_HUB_OFFLINE=0 hf download org/name --revision v2 --include '*.json'" in error


@pytest.mark.parametrize(
    "lost, said",
    [
        ("model_index.json", "org/name is not whole in the cache: org/name holds no"),
        (f"unet/{STEM}.safetensors", f"unet holds no {STEM}.safetensors"),
        (f"vae/{SHARDS[1]}", f"vae lacks {SHARDS[1]}"),
        ("tokenizer/", "org/name lacks tokenizer in the cache"),
    ],
)
def test_offline_what_the_cache_lacks_is_named_with_the_command(cache, lost, said):
    put(cache, {name: MODEL[name] for name in NEEDED if not name.startswith(lost)})
    error = fetched(cache)["error"]
    assert said in error
    assert error.endswith(
        "HF_HUB_OFFLINE is set; fetch it with: HF_HUB_OFFLINE=0 hf download org/name "
        "--include '*.json' --include '*.txt' --include '*.model' --include '*model*.safetensors'"
    )


def test_offline_and_never_fetched(cache):
    error = fetched(cache, variant="fp16")["error"]
    assert error.startswith(
        f"org/name is not in the cache ({cache}), and HF_HUB_OFFLINE is set; fetch it with: "
    )
    assert error.endswith("--include '*model.fp16*.safetensors'")


def test_a_repository_of_one_file_is_that_file(cache):
    snapshot = put(cache, {"dream.safetensors": weights()})
    assert fetched(cache) == {"path": str(snapshot / "dream.safetensors")}


def test_a_cached_model_that_asks_for_code_is_refused(cache):
    index = INDEX | {"unet": ["pipeline", "Net"]}
    put(cache, MODEL | {"model_index.json": json.dumps(index).encode()})
    assert "asks for code of pipeline" in fetched(cache)["error"]


def test_other_names_are_refused(cache):
    assert "write org/name or org/name@revision" in fetched(cache, "../name")["error"]


# --- a Hub made here -----------------------------------------------------------------------------------------------


class Hub:
    """The few answers of a Hub that fetching a model takes, and what it was asked."""

    def __init__(self) -> None:
        self.files, self.commits = MODEL, {"main": COMMIT, "old": OLDER}
        self.refusal: tuple[int, str] | None = None
        self.asked: list[tuple[str, str]] = []  # path and token
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
                hub.asked.append((unquote(urlsplit(self.path).path), self.headers.get("Authorization", "")))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.refusal:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b""
        api, _, rest = path.partition("/api/models/org/name")
        if not api and rest.startswith("/tree/"):
            if rest.removeprefix("/tree/") != COMMIT:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if not api and (rest == "" or rest.startswith("/revision/")):
            commit = self.commits.get(rest.removeprefix("/revision/") or "main")
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            siblings = [{"rfilename": name} for name in self.files]
            body = {"id": "org/name", "sha": commit, "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        prefix = f"/org/name/resolve/{COMMIT}/"
        if path.startswith(prefix) and (content := self.files.get(path.removeprefix(prefix))) is not None:
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def fetched_files(self) -> set[str]:
        return {path.split(f"/resolve/{COMMIT}/")[1] for path, _ in self.asked if "/resolve/" in path}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def online(cache: Path, hub: Hub, name: str = "org/name", env: dict[str, str] | None = None, **options):
    return fetched(cache, name, {"HF_ENDPOINT": hub.url, **(env or {})}, **options)


def test_what_is_needed_is_fetched_and_nothing_that_could_run(cache, hub):
    answer = online(cache, hub, env={"HF_TOKEN": "hf_secret"})
    folder = Path(answer["path"])
    assert folder == cache / "models--org--name/snapshots" / COMMIT
    assert hub.fetched_files() == names(folder) == NEEDED
    assert {token for path, token in hub.asked if "org/name" in path} == {"Bearer hf_secret"}
    assert {path.split("/")[4] for path, _ in hub.asked if "/resolve/" in path} == {COMMIT}
    hub.asked.clear()
    assert fetched(cache, env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}) == answer
    assert online(cache, hub, f"org/name@{COMMIT}") == answer  # a commit does not change
    assert not [path for path, _ in hub.asked if "org/name" in path]
    assert online(cache, hub) == answer
    assert {path for path, _ in hub.asked if "org/name" in path} == {"/api/models/org/name"}
    more = online(cache, hub, skip=[])
    assert names(Path(more["path"])) == NEEDED | SAFETY


def test_a_variant_is_fetched_alone_and_the_other_is_then_known_to_be_absent(cache, hub):
    folder = Path(online(cache, hub, variant="fp16")["path"])
    assert names(folder) == PLAIN | {f"{part}/{STEM}.fp16.safetensors" for part in ("unet", "vae")}
    assert fetched(cache, variant="fp16") == {"path": str(folder)}
    error = fetched(cache)["error"]
    assert f"org/name lacks unet/{STEM}.safetensors in the cache" in error


def test_the_command_that_is_named_fetches_it(cache, hub):
    error = fetched(cache)["error"]
    command = shlex.split(error.partition("fetch it with: ")[2])
    assert command[:2] == ["HF_HUB_OFFLINE=0", "hf"]
    program = Path(sys.executable).parent / "hf"
    if not program.exists():
        pytest.skip("huggingface_hub's command is not installed")
    env = environment(cache, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_UPDATE_CHECK="1")
    done = subprocess.run([str(program), *command[2:]], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {name for name in hub.fetched_files() if name.endswith((".py", ".bin", ".ckpt", ".pkl"))}
    assert "path" in fetched(cache)


def test_a_hub_that_cannot_be_reached_leaves_the_cache(cache):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    error = fetched(cache, env=nowhere)["error"]
    assert "org/name is not in the cache" in error and "the Hub cannot be reached (" in error
    assert "fetch it with: hf download org/name" in error
    snapshot = put(cache, {name: MODEL[name] for name in NEEDED})
    assert fetched(cache, env=nowhere) == {"path": str(snapshot)}


@pytest.mark.parametrize(
    "refusal, name, said",
    [
        (
            (404, "RepoNotFound"),
            "org/name",
            "the Hub has no model org/name, or it is private: then set HF_TOKEN",
        ),
        ((403, "GatedRepo"), "org/name", "org/name is gated: accept its licence at http://127.0.0.1"),
        ((429, ""), "org/name", "the Hub refuses org/name"),
        (None, "org/name@v9", "org/name has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(cache, hub, refusal, name, said):
    hub.refusal = refusal
    error = online(cache, hub, name)["error"]
    assert said in error and len(error) < 500
    assert not list(cache.rglob("*.safetensors"))


def test_a_model_that_asks_for_code_is_refused_before_its_weights_are_fetched(cache, hub):
    hub.files = MODEL | {"model_index.json": json.dumps(INDEX | {"unet": ["pipeline", "Net"]}).encode()}
    assert "asks for code of pipeline" in online(cache, hub)["error"]
    assert hub.fetched_files() == {"model_index.json"}
