"""The house keeps its shape: imports point one way, nothing happens at import, names stay in their room."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "src" / "sfumato"
LEVELS = [
    {
        "errors",
        "wording",
        "checks",
        "parts",
        "types",
        "storage",
        "runtime",
        "pictures",
        "memory",
        "flops",
        "video",
    },
    {"nn"},
    {"text", "autoencoder", "diffusion", "sampling", "checkpoint", "scenes", "adapters"},
    {"families", "data", "tasks"},
    {"drawing", "generate", "planning", "train", "evaluate", "receipts", "fidelity", "bulk"},
    {"study"},
    {"cli", "serve", "cluster", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
APART = {
    "adapters",
    "text",
    "autoencoder",
    "checkpoint",
    "diffusion",
    "sampling",
    "scenes",
}  # do not import each other …
MAY = {("sampling", "diffusion"), ("adapters", "checkpoint")}  # … except here
TORCH_ONLY = {"nn", "diffusion", "sampling", "autoencoder", "scenes", "train", "text"}
LIGHT = {"torch", "numpy", "safetensors", "PIL", "sfumato", *sys.stdlib_module_names}
OPTIONAL = {  # imported inside functions: by a recipe that asks for its logs, by an engine or encoder when it is made
    ("nn", "openvino"),
    ("nn", "nncf"),
    ("train", "tensorboard"),
    ("tasks", "cv2"),
    ("text", "tokenizers"),
    ("text", "transformers"),
}
LATE = {("types", "receipts")}  # inside a function: `Result.save` is sugar for a higher room
FOLDERS = {path.parent.name for path in ROOT.glob("families/*/*.py")} - {"published"}
THEIRS = re.compile(rf"sfumato\.families\.({'|'.join(sorted(FOLDERS))})\b")
NAMED = re.compile(  # sd begins names of a foreign format, and svd is linear algebra's too
    r"(?<![^\W_])(pocket|sd1|sd2|sdxl|sd3)(?![^\W_])|stable[ -](diffusion|video)|\bsvd\.\w", re.IGNORECASE
)
NAMES_ALLOWED = {
    "generate.py": {"pocket"},  # lists the packaged models
    "receipts/webui.py": {"sdxl"},  # keys of a foreign format
}
NETWORKS = re.compile(r"sfumato\.nn\.(unet|mmdit\w*|spacetime|dit\w*)(\.|$)")
NAME_NO_NETWORK = {"checkpoint", "drawing", "planning", "cli", "serve", "receipts"}

FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def room_of(file: Path) -> str:
    part = file.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> list[str]:
    """Every absolute module name the file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(file)}:{node.lineno} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_room_has_its_level():
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms <= set(LEVEL), f"give {rooms - set(LEVEL)} a level"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_imports_point_one_way(file):
    room = room_of(file)
    if room == "__init__":
        return  # names the homes of the public API and imports them on use
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top != "sfumato" or not rest:
            continue
        other = rest.split(".")[0]
        if other not in LEVEL or other == room or (room, other) in LATE:
            continue
        assert LEVEL[other] <= LEVEL[room], f"{label(file)} imports {name} from a room above it"
        if room in APART and other in APART:
            assert (room, other) in MAY, f"{label(file)} imports {name}: these rooms stand apart"


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) in TORCH_ONLY], ids=label)
def test_the_core_runs_wherever_torch_does(file):
    for name in imports(file):
        top = name.split(".")[0]
        allowed = top in LIGHT or (room_of(file), top) in OPTIONAL or name.startswith("torch.")
        assert allowed, f"{label(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_no_unpickler_on_any_path(file):
    unpicklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not {name.split(".")[0] for name in imports(file)} & unpicklers
    for node in ast.walk(TREES[file]):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in {"torch.load", "torch.hub.load", "eval", "exec", "compile", "__import__"}, (
            f"{label(file)}:{node.lineno} calls {name}"
        )
        for keyword in node.keywords:
            told = keyword.arg == "allow_pickle" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            )
            assert not told, f"{label(file)}:{node.lineno} allows pickles"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_families_are_named_in_their_room_alone(file):
    if room_of(file) == "families" and file.parent.name != "published":
        return
    allowed = NAMES_ALLOWED.get(label(file), set())
    documentation = {
        id(node.value)
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Name | ast.Attribute):
            text = node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = node.value
        else:
            continue
        found = {match[0].lower() for match in NAMED.finditer(text)} - allowed
        assert not found, f"{label(file)}:{node.lineno} names a family: {text[:60]!r}"
    for name in imports(file):
        assert not THEIRS.match(name), f"{label(file)} imports {name}"


@pytest.mark.parametrize(
    "text", ["sd3", "for SDXL's", "sd1-inpaint", "at_sd2", "svd.safetensors", "Stable Video Diffusion"]
)
def test_names_of_families_are_known(text):
    assert NAMED.search(text)


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) in NAME_NO_NETWORK], ids=label)
def test_rooms_that_take_any_network_import_none(file):
    for name in imports(file):
        assert not NETWORKS.match(name), f"{label(file)} imports {name}"


PURE = re.compile(
    r"dataclass|dataclasses\.dataclass|field|property|staticmethod|classmethod|TypeVar|NewType|namedtuple|MappingProxyType"
    r"|set|frozenset|tuple|dict|list|sorted|range|len|min|max|sum|abs|round|float|int|str|bytes|zip|enumerate|map|any|all"
    r"|re\.compile|logging\.getLogger|math\.\w+|functools\.\w+|lru_cache|cache|contextmanager|struct\.Struct|torch\.(no_grad|inference_mode)"
    r"|'[^']*'\.\w+|_?[A-Z]\w*"  # methods of literal texts, and classes
    r"|\w+\.(items|values|keys|split|union|join|format|lower|upper|from_bytes)"
)


def executed_at_import(tree: ast.Module):
    """Calls that run when the module is imported: at its top, in class bodies, decorators and defaults."""
    postponed = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(a.name == "annotations" for a in node.names)
        for node in tree.body
    )

    def walk(node: ast.AST):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
            if not isinstance(node, ast.Lambda):
                inner += node.decorator_list
            for child in inner:
                yield from walk(child)
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"}:
            return
        if isinstance(node, ast.AnnAssign) and postponed:
            if node.value:
                yield from walk(node.value)
            return
        if isinstance(node, ast.Call):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for statement in tree.body:
        yield from walk(statement)


@pytest.mark.parametrize("file", FILES, ids=label)
def test_only_pure_definitions_run_at_import(file):
    """Types and tables may be worked out, also by a helper of the same file."""
    own = {node.name for node in TREES[file].body if isinstance(node, ast.FunctionDef)}
    for call in executed_at_import(TREES[file]):
        name = ast.unparse(call.func)
        assert name in own or PURE.fullmatch(name), f"{label(file)}:{call.lineno} calls {name} at import"


@pytest.mark.parametrize("file", FILES, ids=label)
def test_no_loops_tests_or_assignments_to_others_at_import(file):
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign,
    )  # fmt: skip
    for node in TREES[file].body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"}, (
                f"{label(file)}:{node.lineno}"
            )
            continue
        assert isinstance(node, allowed), (
            f"{label(file)}:{node.lineno} runs a {type(node).__name__} at import"
        )
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                assert all(isinstance(name, ast.Name) for name in names), (
                    f"{label(file)}:{node.lineno} changes {ast.unparse(target)}"
                )


WATCH = """
import importlib, json, os, random, sys, threading, warnings
import numpy, torch
def state():
    return [
        threading.active_count(), random.getstate()[1][:3], int(numpy.random.get_state()[1].sum()),
        torch.initial_seed(), torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.is_grad_enabled(),
        str(torch.get_default_dtype()), torch.get_float32_matmul_precision(), torch.cuda.is_initialized(),
        torch.are_deterministic_algorithms_enabled(), dict(os.environ), os.getcwd(), [str(f) for f in warnings.filters],
    ]
# what others do on import is not ours: bring them in first
for name in (
    "typer.main", "rich.console", "PIL.Image", "safetensors.torch", "torch.utils.flop_counter", "torch.distributed",
    "sqlalchemy", "fastapi", "uvicorn", "prometheus_client", "asyncio"
):
    importlib.import_module(name)
before = state()
opened = []
def audit(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        opened.append(str(arguments[0]))
    if event in ("os.mkdir", "socket.connect", "subprocess.Popen", "os.remove", "os.rename"):
        opened.append(event + " " + str(arguments[0]))
sys.dont_write_bytecode = True
sys.addaudithook(audit)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if (after := state()) != before:
        sys.exit(f"importing {name} changed the process: {[(b, a) for b, a in zip(before, after) if a != b]}")
if opened:
    sys.exit(f"importing wrote or connected: {opened}")
"""


def modules() -> list[str]:
    names = []
    for file in FILES:
        parts = list(file.relative_to(ROOT.parent).with_suffix("").parts)
        if parts[-1] == "__main__":
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder
    )


def test_importing_everything_changes_nothing(tmp_path):
    done = run(WATCH, json.dumps(modules()), folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_package_and_the_command_s_help_are_light(tmp_path):
    code = "import sys, sfumato; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'typer')))"
    assert run(code, folder=tmp_path).returncode == 0
    code = (
        "import sys; from sfumato.cli.app import run\n"
        "for verb in ([], ['--version'], *([v, '--help'] for v in sys.argv[1:])): assert run(verb) == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'safetensors')))"
    )
    from sfumato.cli.app import VERBS

    done = run(code, *VERBS, folder=tmp_path)
    assert done.returncode == 0, done.stderr


ASKING = {"drawing", "generate", "planning", "receipts", "evaluate", "fidelity", "bulk", "cli", "serve"}


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) in ASKING], ids=label)
def test_what_a_system_offers_is_declared(file):
    """`families/system.py` has an answer for every model, so nobody has to look whether an attribute is there."""
    for node in ast.walk(TREES[file]):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in {"getattr", "hasattr"}:
            continue
        of, name = node.args[:2]
        looked = ast.unparse(of).split(".")[-1] == "system" and isinstance(name, ast.Constant)
        assert not looked, f"{label(file)}:{node.lineno}: {ast.unparse(node)}"
