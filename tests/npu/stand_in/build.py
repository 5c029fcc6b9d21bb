"""Builds the stand-in for CANN: `device.c`, and a function that returns 0 for every other name that torch_npu asks CANN for."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = {"gcc": "gcc", "nm": "binutils", "strings": "binutils"}
COMPILER = ("gcc", "-std=gnu11", "-O1", "-fPIC", "-pthread")
MAIN_LIBRARY = "libcann_stand_in.so"

# The libraries that the wheel is linked with or opens, in the order in which they can be loaded. Each is an empty shell around
# the one library that has the functions.
SHELLS = (
    "libascend_protobuf.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libgraph.so",
    "libge_runner.so",
    "libfmk_parser.so",
    "libhccl.so",
    "libatb.so",
    "libopapi.so",
)
SYSTEM_LIBRARIES = ("c.so.6", "m.so.6", "stdc++.so.6", "gcc_s.so.1", "pthread.so.0", "dl.so.2", "rt.so.1")

# Functions that the wheel looks up by name while it runs, as they stand among its strings.
LOOKED_UP = re.compile(r"(acl(rt|mdl|sys|prof|op|Get|Set|Query)[A-Z]\w+|Hccl[A-Z][a-z]\w+|Hcom[a-z]\w+)")
KERNEL = re.compile(r"aclnn[A-Z]\w+")
COLLECTIVE = re.compile(r"Hccl(All\w+|Reduce\w*|Broadcast|Scatter|Send|Recv|BatchSendRecv)")
KERNEL_SUPPORT = {
    *("InitHugeMemThreadLocal", "UnInitHugeMemThreadLocal", "ReleaseHugeMem"),
    *("aclDestroyAclOpExecutor", "aclDestroyTensor", "aclDestroyScalar", "aclDestroyIntArray", "aclDestroyBoolArray"),
    *("aclDestroyFloatArray", "aclDestroyTensorList", "aclDestroyScalarList"),
}


def check_tools() -> None:
    """Say what to install where a tool is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"the stand-in for CANN is built with {', '.join(TOOLS)}, and {', '.join(missing)} cannot be found: "
            f"install {' and '.join(dict.fromkeys(TOOLS[tool] for tool in missing))}"
        )


def build_libraries(cache: Path) -> Path:
    """The folder of the built libraries, below `cache`. Built once for each version of the wheel and of these sources."""
    folder = cache / _key()
    if not folder.exists():
        check_tools()
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache))
        try:
            _compile(unfinished)
            os.replace(unfinished, folder)
        except OSError:
            if not folder.exists():  # else another process was first, and its libraries are the same
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _key() -> str:
    digest = hashlib.sha256()
    for source in (HERE / "build.py", HERE / "device.c"):
        digest.update(source.read_bytes())
    for package in ("torch", "torch_npu"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


def _compile(folder: Path) -> None:
    device, generated = folder / "device.o", folder / "generated.c"
    _run(*COMPILER, "-c", str(HERE / "device.c"), "-o", str(device))
    written = {name for _, name in _symbols(device, "--defined-only")}
    launched, silent = _names(_package("torch"), _package("torch_npu"))
    results = dict.fromkeys(silent, "0") | {name: f'stand_in_launched("{name}")' for name in launched}
    functions = (_function(i, name, results[name]) for i, name in enumerate(sorted(results.keys() - written)))
    generated.write_text("\n".join(["long stand_in_launched(const char *name);", *functions, ""]))
    _link(folder, MAIN_LIBRARY, str(device), str(generated))
    for shell in SHELLS:
        # Linked by its name and not its path: it is loaded first, and so is found without a search path.
        _link(folder, shell, "-Wl,--no-as-needed", f"-L{folder}", f"-l:{MAIN_LIBRARY}")


def _link(folder: Path, name: str, *inputs: str) -> None:
    _run(*COMPILER, "-shared", *inputs, f"-Wl,-soname,{name}", "-o", str(folder / name))


def _function(index: int, name: str, result: str) -> str:
    """A function in C whose name, often a mangled one of C++, is known to the assembler alone."""
    return f'long generated_{index}(void) __asm__("{name}");\nlong generated_{index}(void) {{ return {result}; }}'


def _names(torch: Path, torch_npu: Path) -> tuple[set[str], set[str]]:
    """The functions that launch a kernel or a collective, and all others, that the wheel needs and no library here has."""
    wheel = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so"), *torch_npu.glob("dynamo/torchair/core/*.so")]
    providers = [*torch.glob("lib/*.so*"), *wheel, *_system_libraries()]
    provided = {name for library in providers for _, name in _symbols(library, "-D", "--defined-only")}
    linked = {
        name
        for library in wheel
        for kind, name in _symbols(library, "-D", "--undefined-only")
        if kind not in "wv" and not name.startswith(("Py", "_Py", "__"))
    }
    texts = {text for library in wheel for text in _run("strings", "-n", "6", str(library)).split()}
    looked_up = {text for text in texts if LOOKED_UP.fullmatch(text)}
    kernels = {text.removesuffix("GetWorkspaceSize") for text in texts if KERNEL.fullmatch(text)}
    launched = kernels | {name for name in looked_up if COLLECTIVE.fullmatch(name)}
    prepared = {f"{name}GetWorkspaceSize" for name in kernels}
    return launched, (linked - provided) | looked_up | prepared | KERNEL_SUPPORT


def _symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """The kind and the name, without its version, of the symbols that nm lists with these options."""
    lines = _run("nm", *options, str(file)).splitlines()
    return [(line.split()[-2], line.split()[-1].partition("@")[0]) for line in lines]


def _system_libraries() -> list[Path]:
    found = (Path(_run("gcc", f"-print-file-name=lib{name}").strip()) for name in SYSTEM_LIBRARIES)
    return [path for path in found if path.is_absolute()]  # gcc answers with the bare name where it knows no file


def _package(name: str) -> Path:
    # Without importing it: torch_npu cannot be imported before the stand-in is loaded.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the stand-in for CANN needs {name}")
    return Path(spec.origin).parent


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
