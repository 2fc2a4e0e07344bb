"""Rows of q8_0 and q4_0 against the engine's own library: tests/data/make_blocks.py has it quantize many blocks, and
unit.blocks compares. Run through run.sh."""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import llama_cpp

MAKE = pathlib.Path(__file__).parents[1] / "data" / "make_blocks.py"
COUNT = 20000  # blocks of each type


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=pathlib.Path)  # run.sh gives it to every script
    parser.parse_args()
    library = pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    with tempfile.TemporaryDirectory() as folder:
        blocks = pathlib.Path(folder, "blocks.txt")
        subprocess.run([sys.executable, MAKE, blocks, "--count", str(COUNT), "--ggml", library], check=True)
        return subprocess.run([os.environ["XKV_TEST_BLOCKS"]], env={**os.environ, "XKV_BLOCKS": str(blocks)}).returncode


if __name__ == "__main__":
    sys.exit(main())
