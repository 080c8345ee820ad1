"""Products checked by a program in C: here, and on an emulated ARM, whose instructions no other test has."""

import os
import shutil
import subprocess

import pytest

FLAGS = ["-std=gnu11", "-O1", "-ffp-contract=fast", "-fno-trapping-math", "-pthread", "-Wno-psabi"]


def program(compiler, repository, folder, sets):
    """The program of products.c with sets of instructions: names, and the flags that they need."""
    source, built = repository / "g3n_mlx/kernels/src", folder / "products"
    objects = []
    for name, flags in sets.items():
        objects.append(str(folder / f"{name}.o"))
        command = [compiler, *FLAGS, *flags, f"-DINSTRUCTIONS={name}", "-c", str(source / "instructions.c")]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    files = [str(source / "pool.c"), str(source / "g3n.c"), str(repository / "tests/kernels/products.c"), *objects]
    subprocess.run([compiler, *FLAGS, "-I", str(source), *files, "-o", str(built), "-lm"], check=True)
    return str(built)


@pytest.mark.slow
def test_neon_under_emulation(repository, tmp_path):
    """Right on an emulated 64-bit ARM; its speed has not been measured on a real one."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    built = program(compiler, repository, tmp_path, {"plain": [], "neon": []})
    for name in ("neon", "plain"):
        command = [emulator, "-L", "/usr/aarch64-linux-gnu", built, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert (done.returncode, done.stdout) == (0, f"{name}: 0 wrong\n"), done.stderr


def test_the_program_finds_what_is_wrong(repository, tmp_path):
    """A library whose product is off by a little is caught, so that a silent program means something."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        pytest.skip("there is no C compiler")
    wrong = tmp_path / "wrong.c"
    wrong.write_text(
        '#include "g3n.h"\n'
        "int g3n_use(const char *name) { return name[0] != 0; }\n"
        "void g3n_threads(int count) { (void)count; }\n"
        "void g3n_product(const Matrix *m, const float *x, int rounded, int rows, float *y) {\n"
        "    for (int i = 0; i < rows * m->rows; i++) y[i] = x[0] * rounded;\n"
        "}\n"
    )
    source, built = repository / "g3n_mlx/kernels/src", tmp_path / "products"
    files = [str(wrong), str(repository / "tests/kernels/products.c")]
    subprocess.run([compiler, *FLAGS, "-I", str(source), *files, "-o", str(built), "-lm"], check=True)
    assert subprocess.run([str(built), "plain"], capture_output=True, check=False).returncode == 1
