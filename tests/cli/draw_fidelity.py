"""draw_fidelity.py REPOSITORY PAGE - a page of python -m xkv.fidelity --report, of recorded results and of made ones with
every figure; drawn by the package's source as it lies there, without its compiled part."""
import json
import pathlib
import sys
import types


def made(parts):
    """Results of a model that is called so."""
    def layers(scale):
        return [{"layer": i, "K": scale * (0.05 + 0.003 * (i * 7 % 11)), "V": scale * (0.2 + 0.01 * (i * 5 % 13))}
                for i in range(30)]
    rows = [dict(prompt="made", tokens=1024, method=f"{name} {ratio}x", ratio=ratio, kl=kl, kl_p99=8 * kl, top1=1 - 10 * kl,
                 entry_bytes=sum(sizes), parts=dict(zip(parts, sizes)), layers=layers(100 * kl))
            for name, ratio, kl, sizes in (("dict", 16, 0.005, (900000, 300000, 0, 92160, 30000, 4000, 900, 7000)),
                                           ("svd", 8, 0.007, (2100000, 0, 0, 92160, 600000, 4000, 900, 9000)))]
    speeds = [dict(tokens=t, ratio=16, prefill_seconds=t / 300, restore_seconds=t / 6000) for t in (256, 1024, 4096)]
    return dict(model="made", following=256, rows=rows, speeds=speeds)


def main():
    root, page = map(pathlib.Path, sys.argv[1:])
    package = types.ModuleType("xkv")
    package.__path__ = [str(root / "python" / "src" / "xkv")]
    sys.modules["xkv"] = package
    sys.dont_write_bytecode = True
    from xkv import report
    results = page.with_suffix(".json")
    results.write_text(json.dumps(made(report.PARTS)))
    report.write([results, root / "tests" / "engine" / "results" / "fidelity-2026-11-26.json",
                  root / "tests" / "bench" / "results" / "restore-2026-11-27.json"], page)


if __name__ == "__main__":
    main()
