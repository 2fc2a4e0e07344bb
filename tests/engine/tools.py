"""The installed tools, as scripts call them: XKV_BIN names their folder."""
import json
import os
import pathlib
import subprocess


def path_of(name):
    return str(pathlib.Path(os.environ["XKV_BIN"], name))


def version():
    return subprocess.run([path_of("xkv-pack"), "--version"], capture_output=True, text=True).stdout.split("\n")[0]


def tool(name, *options):
    """Run one of the tools; its report."""
    command = [path_of(name), "--json", "-q", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def train(caches, metric, model_file, path, *options):
    """A dictionary trained now, at `path`."""
    weights = ["--metric", metric] if metric else []
    tool("xkv-train", "-f", "-o", path, "--model", model_file, *weights, *options, *caches)
    return path
