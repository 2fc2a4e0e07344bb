"""python -m xkv.slots watch|save|restore - the slot files of llama-server (--slot-save-path) in a store.

    watch    pack every slot file that the server saves into the store, and remove it
    save     ask the server to save a slot, then pack its file
    restore  write a slot file from the store, ask the server to restore it, and remove it

The server knows names only. Each name is kept as a small file NAME.xkvslot beside the slot files, with the entry's id;
`restore --prompt` looks for the longest stored prefix of a prompt instead. The server ends at a damaged file: what is
written here has passed all checks, and appears under its name when it is complete."""
from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Callable, Dict, List, Optional, Tuple

from ._weights import weights_mark
from .cache import Cache
from .dictionary import Dictionary
from .errors import TruncatedError, XkvError
from .model import Model
from .prompt import Namespace
from .store import Match, Store
from .store_types import PutReport

SUFFIX = ".xkvslot"
Say = Callable[[str], None]


class SlotError(RuntimeError):
    """The server refuses, or there is no such slot file or entry."""


class Slots:
    """A folder of slot files and a store."""

    def __init__(self, folder: pathlib.Path, store: Store, model: Model, *, settings: str = "", salt: bytes = b"",
                 **options: Any) -> None:
        """settings: whatever else makes the server's caches differ. options: how to pack (PackOptions)."""
        self.folder, self.store, self.model, self.options = folder, store, model, options
        self.namespace = Namespace(model, settings=f"llama-server {settings}".rstrip(), salt=salt)
        self._seen: Dict[pathlib.Path, Tuple[int, int]] = {}     # size and time of change at the last look
        self._refused: Dict[pathlib.Path, Tuple[int, int]] = {}  # of files that are no slot files

    # --- Packing ---

    def pack(self, name: str, keep: bool = False) -> PutReport:
        """Store a slot file that is complete, and remove it unless `keep`. TruncatedError: it is not complete."""
        path = self.path_of(name)
        with Cache.open(path, self.model) as cache:
            if cache.geometry.tokens == 0 or len(cache.geometry.token_ids) == 0:
                raise SlotError(f"{path} is not a slot file of tokens ({cache.engine})")
            ids = cache.geometry.token_ids[:cache.geometry.tokens]
            put = self.store.put_reachable(self.namespace, cache, ids, **self.options)
        note = dict(id=put.id, tokens=put.tokens)
        partial = self.folder / f".{name}.partial"
        partial.write_text(json.dumps(note) + "\n")
        partial.replace(self.folder / (name + SUFFIX))
        if not keep:
            path.unlink()
        return put

    def pack_new(self, say: Say, keep: bool = False) -> int:
        """Pack what has not changed since the last call; how many files."""
        done = 0
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(".") or path.name.endswith(SUFFIX) or not path.is_file():
                continue
            status = path.stat()
            now = status.st_size, status.st_mtime_ns
            settled = self._seen.get(path) == now and self._refused.get(path) != now
            self._seen[path] = now
            if settled and not (keep and self._noted(path, status.st_mtime)):
                done += self._try(path, now, say, keep)
        return done

    def _noted(self, path: pathlib.Path, changed: float) -> bool:
        note = path.with_name(path.name + SUFFIX)
        return note.exists() and note.stat().st_mtime >= changed

    def _try(self, path: pathlib.Path, now: Tuple[int, int], say: Say, keep: bool) -> int:
        try:
            put = self.pack(path.name, keep)
        except TruncatedError:
            return 0  # still being written
        except (XkvError, SlotError, OSError) as error:
            self._refused[path] = now
            say(f"{path.name}: {error}")
            return 0
        say(f"{path.name}: {put.tokens} tokens stored in {put.bytes} bytes")
        return 1

    # --- Restoring ---

    def restore(self, name: str, tokens: Optional[List[int]] = None) -> int:
        """Write the slot file of a name that was packed, or of the longest stored prefix of `tokens`; how many tokens."""
        try:
            with self._match(name, tokens) as match:
                if not match:
                    raise SlotError(f"nothing is stored for {name}: {match.reason}")
                match.restore_file(self.path_of(name), overwrite=True)
                return match.tokens
        except XkvError as error:
            raise SlotError(f"{name} cannot be restored: {error}") from error

    def _match(self, name: str, tokens: Optional[List[int]]) -> Match:
        if tokens is not None:
            return self.store.match(self.namespace, tokens)
        note = self.path_of(name).with_name(name + SUFFIX)
        if not note.exists():
            raise SlotError(f"no slot {name} was packed in {self.folder}")
        return self.store.get(self.namespace, int(json.loads(note.read_text())["id"]))

    def path_of(self, name: str) -> pathlib.Path:
        if not name or "/" in name or name.startswith(".") or "\0" in name:
            raise SlotError(f"{name!r} is not the name of a slot file")
        return self.folder / name


class Server:
    """llama-server's slots."""

    def __init__(self, url: str, timeout: float = 600) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout

    def act(self, slot: int, action: str, name: str) -> Dict[str, Any]:
        """action: "save" or "restore". Its reply."""
        return self._ask(f"/slots/{slot}?action={action}", dict(filename=name))

    def check_model(self, path: pathlib.Path) -> None:
        """SlotError when the server says that it runs another file than `path`, as far as that file can be seen here."""
        running = pathlib.Path(str(self._ask("/props").get("model_path", "")))
        if running.is_file() and weights_mark(running) != weights_mark(path):
            raise SlotError(f"the server at {self.url} runs {running}, which is not {path}")

    def tokenize(self, text: str) -> List[int]:
        """As the server does for a completion."""
        return list(self._ask("/tokenize", dict(content=text, add_special=True))["tokens"])

    def _ask(self, path: str, body: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """GET, or POST of a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            raise SlotError(f"{self.url}{path}: {error.code}: {error.read(300).decode(errors='replace')}") from error
        except (OSError, ValueError) as error:
            raise SlotError(f"{self.url}{path}: {error}") from error


def restore_into(slots: Slots, server: Server, slot: int, name: str, tokens: Optional[List[int]] = None) -> Tuple[int, int]:
    """Restore a slot of the server from the store: tokens of the entry, tokens that the server says it has now."""
    stored = slots.restore(name, tokens)
    try:
        reply = server.act(slot, "restore", name)
    finally:
        slots.path_of(name).unlink(missing_ok=True)
    return stored, int(reply.get("n_restored", 0))


# --- Command line ---

def parse_arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m xkv.slots", description="Slot files of llama-server in a store.")
    parser.add_argument("command", choices=("watch", "save", "restore"))
    parser.add_argument("name", nargs="?", help="save, restore: of the slot file")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="the server's --slot-save-path")
    parser.add_argument("--store", type=pathlib.Path, required=True, help="folder of the store; made when it is not there")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="GGUF file that the server runs")
    parser.add_argument("--settings", default="", help="whatever else makes the server's caches differ, as -ctk, --rope-*")
    parser.add_argument("--server", default="http://127.0.0.1:8080", help="[http://127.0.0.1:8080]")
    parser.add_argument("--slot", type=int, default=0, help="number of the slot [0]")
    parser.add_argument("--prompt", type=pathlib.Path, help="restore: the longest stored prefix of this text instead of a "
                        "name")
    parser.add_argument("--dictionary", type=pathlib.Path, help="to pack with (.xkvd)")
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--error", type=float)
    parser.add_argument("--quality", type=float)
    parser.add_argument("--keep", action="store_true", help="do not remove slot files that are packed")
    parser.add_argument("--interval", type=float, default=1.0, help="watch: seconds between looks [1]")
    args = parser.parse_intermixed_args(arguments)  # names may stand behind options
    if args.command != "watch" and not args.name:
        parser.error(f"{args.command} needs a name")
    return args


def open_slots(args: argparse.Namespace) -> Slots:
    store = Store.open(args.store) if (args.store / "store").exists() else Store.init(args.store)
    options: Dict[str, Any] = {name: getattr(args, name) for name in ("ratio", "error", "quality")
                               if getattr(args, name) is not None}
    if args.dictionary and args.command != "restore":
        store.put_dictionary(args.dictionary)
        options["dictionary"] = Dictionary.open(args.dictionary)
    settings = f"weights={weights_mark(args.model)} {args.settings}".rstrip()
    return Slots(args.folder, store, Model.from_gguf(args.model), settings=settings, **options)


def say(text: str) -> None:
    print(text, flush=True)


def run(args: argparse.Namespace) -> None:
    slots, server = open_slots(args), Server(args.server)
    if args.command != "watch":
        server.check_model(args.model)
    if args.command == "save":
        server.act(args.slot, "save", args.name)
        put = slots.pack(args.name, args.keep)
        say(f"{args.name}: {put.tokens} tokens stored in {put.bytes} bytes")
    elif args.command == "restore":
        tokens = server.tokenize(args.prompt.read_text(errors="replace")) if args.prompt else None
        stored, restored = restore_into(slots, server, args.slot, args.name, tokens)
        say(f"{args.name}: the server restored {restored} tokens, of {stored}")
    else:
        say(f"watching {args.folder}")
        while True:
            slots.pack_new(say, args.keep)
            time.sleep(args.interval)


def main(arguments: Optional[List[str]] = None) -> int:
    try:
        run(parse_arguments(arguments))
    except KeyboardInterrupt:
        return 130
    except (SlotError, XkvError, OSError) as error:
        print(f"xkv.slots: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
