"""Compiles a library of C++ operators on first use and keeps it in the user's cache.

What comes out depends on the sources, PyTorch, the compiler and the processor, and so does its
file's name: nothing stale is ever loaded. Without a compiler, or when anything fails, nothing is
loaded and `why_not` says why: callers have plain PyTorch to fall back on. Silent; whoever wants to
tell people that a compiler runs for some seconds passes a function.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

FLAGS = "-std=c++20 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -w".split()
# What the kernels use of a processor, by the names of /proc/cpuinfo and of the compiler.
AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, *"avx512f avx512bw avx512dq avx512vl".split())
AVX512_NEWER = {"avx512vbmi": "avx512vbmi", "avx512_vnni": "avx512vnni"}
AVX512_NEWER["avx512_bf16"] = "avx512bf16"
COMPILE_SECONDS = 300  # until a compiler is given up


class Unavailable(Exception):
    """Why there are no kernels."""


def kernels_wanted() -> bool:
    """Whether GPTFAST_NO_KERNELS is not set, which leaves everything to plain PyTorch."""
    return os.environ.get("GPTFAST_NO_KERNELS", "0") in ("", "0")


class Library:
    """Operators from C++ sources that register themselves with PyTorch when they are loaded. They
    may include the headers of another library and call what it exports.
    """

    def __init__(
        self, name: str, folder: Path, sources: Sequence[str], needs: "Library | None" = None
    ) -> None:
        self.name, self.folder, self.sources, self.needs = name, folder, sources, needs
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._why_not: str | None = None

    def load(self, progress: Callable[[str], None] | None = None) -> Path | None:
        """The library's file, loaded; None where there is none (see `why_not`). The first call
        decides. `progress` hears one line when a compiler is started.
        """
        with self._lock:
            if self._path is None and self._why_not is None:
                try:
                    path = self._built(progress)
                    torch.ops.load_library(str(path))
                    self._path = path
                except (Unavailable, OSError, RuntimeError, subprocess.SubprocessError) as error:
                    cause = error.__cause__ or error
                    self._why_not = " ".join(str(cause).split())
            return self._path

    def why_not(self) -> str | None:
        """Why nothing is loaded; None when it is, or before `load`."""
        return self._why_not

    def _built(self, progress: Callable[[str], None] | None) -> Path:
        if not kernels_wanted():
            raise Unavailable("GPTFAST_NO_KERNELS is set")
        compiler, flags = find_compiler(), [*FLAGS, *processor_flags()]
        linked = loaded_openmp()
        # Linking with -fopenmp would bring the compiler's own runtime, a second pool of threads
        # beside PyTorch's.
        flags += ["-fopenmp"] if linked else []
        named = [*flags, *linked]
        if self.needs is not None:
            base = self.needs.load(progress)
            if base is None:
                raise Unavailable(self.needs.why_not())
            named.append(base.name)  # which stands for what is in it, not for where it lies
            flags.append(f"-I{self.needs.folder}")
            # Found beside this one, wherever both lie.
            linked += [f"-L{base.parent}", f"-l:{base.name}", "-Wl,-rpath,$ORIGIN"]
        path = cache_folder() / f"{self.name}-{self._key(compiler, named)}.so"
        if path.exists():
            return _checked(path)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever came second finds the work done
            if not path.exists():
                if progress is not None:
                    progress(f"compiling {self.name} for this processor (once)")
                self._compile(compiler, flags, linked, path)
        return _checked(path)

    def _key(self, compiler: list[str], options: list[str]) -> str:
        parts = [torch.__version__, torch.__config__.show(), shlex.join(compiler + options)]
        parts.append(_run([*compiler, "--version"]))
        digest = hashlib.sha256("\0".join(parts).encode())
        for file in sorted(self.folder.iterdir()):
            if file.suffix in (".cpp", ".h"):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:32]

    def _compile(
        self, compiler: list[str], flags: list[str], linked: list[str], path: Path
    ) -> None:
        """Every source in a process of its own, then all of them into `path` at once."""
        package = Path(torch.__file__).parent
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        include = ["-isystem", str(package / "include")]
        command = [*compiler, *flags, *include, abi, "-DAT_PER_OPERATOR_HEADERS"]
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            objects = [str(Path(work, source).with_suffix(".o")) for source in self.sources]
            _run_all(
                [*command, "-c", str(self.folder / source), "-o", output]
                for source, output in zip(self.sources, objects, strict=True)
            )
            output = str(Path(work, "library.so"))
            libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10", *linked]
            _run([*compiler, "-shared", *objects, *libraries, "-o", output])
            os.chmod(output, 0o700)  # whatever the umask lets others do
            os.replace(output, path)


def cache_folder(kind: str = "kernels") -> Path:
    """Where built libraries lie (or things of another kind): below $GPTFAST_CACHE_DIR, else gptfast
    in the user's cache; made where it is not there. Unavailable where others could put something
    into it.
    """
    own = os.environ.get("GPTFAST_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(own) if own else Path(shared) / "gptfast"
    folder = folder.absolute() / kind
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _checked(folder)
    if not os.access(folder, os.W_OK):
        raise Unavailable(f"{folder} cannot be written")
    return folder


def find_compiler() -> list[str]:
    """$CXX, or the compiler that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise Unavailable(f"no C++ compiler: {' '.join(named) or 'g++, c++ and clang++'} not found")


def processor_flags() -> list[str]:
    """The instructions to compile for: the widest that the kernels know, the processor has and
    PyTorch uses (ATEN_CPU_CAPABILITY=avx2 asks for less).
    """
    level, has = torch.backends.cpu.get_cpu_capability(), processor()
    if level == "AVX512" and has.issuperset((*AVX512, *AVX512_NEWER)):
        return [f"-m{name}" for name in (*AVX512, *AVX512_NEWER.values())]
    if level in ("AVX512", "AVX2") and has.issuperset(AVX2):
        return [f"-m{name}" for name in AVX2]
    raise Unavailable("no kernels for this processor: they need AVX2")


def loaded_openmp() -> list[str]:
    """The file of the OpenMP runtime that PyTorch itself calls, if any. Others may be loaded too:
    packages bring their own.
    """
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        address = ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError:
        return []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return [file]
    return []


def processor() -> set[str]:
    """What the processor says it can do."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _checked(path: Path) -> Path:
    """The path; Unavailable where someone else owns it or may write it."""
    facts = path.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"{path} is not loaded from: others can write it")
    return path


def _run(command: list[str]) -> str:
    """Its output; Unavailable with the first error it wrote."""
    return _run_all([command])[0]


def _run_all(commands: Iterable[list[str]]) -> list[str]:
    """As `_run`, all at the same time."""
    pipe = subprocess.PIPE
    running = [
        (command, subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=COMPILE_SECONDS)[0] for _, process in running]
    finally:
        for _, process in running:
            process.kill()  # of those that have ended, nothing
    for (command, process), output in zip(running, outputs, strict=True):
        if process.returncode:
            lines = output.splitlines() or ["no message"]
            error = next((line for line in lines if "error" in line), lines[-1])
            raise Unavailable(f"{Path(command[0]).name} failed: {error}")
    return outputs


SOURCES = ("linear.cpp", "rows.cpp", "gemm.cpp", "plain.cpp")
LINEAR = Library("quantized_linear", Path(__file__).parent, SOURCES)
