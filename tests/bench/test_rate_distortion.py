"""The arithmetic behind the rate-distortion bench, on small cases whose results are known. Needs numpy only."""
import pathlib
import struct
import sys
import tempfile
import unittest
import xml.etree.ElementTree

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "engine"))

import baselines
import distortion
import gguf_header
import plot
import report
import svd_reference

RANDOM = np.random.default_rng(1)


def planes(layers, tokens, width):
    return [RANDOM.standard_normal((tokens, width)) for _ in range(layers)]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(a)


class Blocks(unittest.TestCase):
    def test_bytes(self):
        rows = np.ones((3, 64), np.float32)
        self.assertEqual(baselines.q8_0(rows)[1], 6 * 34)  # 32 bytes and a scale
        self.assertEqual(baselines.q4_0(rows)[1], 6 * 18)  # 16 bytes and a scale

    def test_values_on_the_grid_stay(self):
        codes = RANDOM.integers(-127, 128, (4, 32))
        codes[:, 0] = 127
        np.testing.assert_array_equal(baselines.q8_0(codes * 0.5)[0], codes * 0.5)
        codes = RANDOM.integers(-8, 8, (4, 32))
        codes[:, 0] = -8
        np.testing.assert_array_equal(baselines.q4_0(codes * 0.25)[0], codes * 0.25)

    def test_error_of_half_a_step(self):
        rows = RANDOM.uniform(-1, 1, (100, 32))
        self.assertLess(np.abs(baselines.q8_0(rows)[0] - rows).max(), 0.51 / 127 + 2 ** -11)
        self.assertLess(np.abs(baselines.q4_0(rows)[0] - rows).max(), 1 / 8 + 2 ** -11)  # +1 has no code

    def test_zeros(self):
        for quantize in (baselines.q8_0, baselines.q4_0):
            np.testing.assert_array_equal(quantize(np.zeros((2, 32)))[0], np.zeros((2, 32)))


class GroupedSvd(unittest.TestCase):
    def test_optimum(self):
        """The error is that of the singular values left out (Eckart and Young), for long and for short prompts."""
        for tokens in (50, 20):
            x = planes(2, tokens, 16)
            values = np.linalg.svd(np.hstack(x), compute_uv=False)
            for rank in (1, 5, 19):
                approximation = np.hstack(baselines.GroupedSvd(x, 2).at(rank)[0])
                optimum = np.sqrt((values[rank:] ** 2).sum() / (values ** 2).sum())
                self.assertAlmostEqual(relative(np.hstack(x), approximation), optimum, delta=1e-3)

    def test_same_as_the_oracle(self):
        x = planes(6, 40, 8)
        ours, size = baselines.GroupedSvd(x, 4).at(12)
        oracle, oracle_size = svd_reference.low_rank(x, 4, 12)
        self.assertEqual(size, oracle_size)
        np.testing.assert_allclose(np.hstack(ours), np.hstack(oracle), atol=0.02)

    def test_full_rank(self):
        x = planes(1, 40, 8)
        self.assertLess(relative(x[0], baselines.GroupedSvd(x, 1).at(8)[0][0]), 1e-3)

    def test_bytes(self):
        svd = baselines.GroupedSvd(planes(6, 100, 8), 4)  # groups of 4 and of 2 layers: 32 and 16 wide
        self.assertEqual(svd.size_at(10), 2 * 10 * (100 + 32) + 2 * 5 * (100 + 16))

    def test_ranks_at_a_size(self):
        keys, values = (baselines.GroupedSvd(planes(4, 100, 8), 4) for _ in range(2))
        size = 2 * 20 * (100 + 32)
        self.assertEqual(baselines.ranks_at(keys, values, size), (8, 12))
        self.assertEqual(baselines.ranks_at(keys, values, size - 1), (8, 11))
        self.assertIsNone(baselines.ranks_at(keys, values, 100))


class Merge(unittest.TestCase):
    def test_layers_of_the_same_directions(self):
        a = planes(1, 30, 8)[0]
        merged, _ = baselines.merge_layers([a, 3 * a], 0, 0)
        self.assertLess(relative(a, merged[0]), 1e-3)
        self.assertLess(relative(3 * a, merged[1]), 1e-3)

    def test_ends_of_the_arc(self):
        a, b = planes(2, 30, 8)
        self.assertLess(relative(a, baselines.merge_pair(a, b, 0, 0)[0]), 1e-3)
        self.assertLess(relative(b, baselines.merge_pair(a, b, 0, 1)[1]), 1e-3)

    def test_middle_of_a_right_angle(self):
        direction, angle = baselines.slerp(np.array([[2., 0]]), np.array([[0, 5.]]), 0.5)
        np.testing.assert_allclose(direction, [[0.5 ** 0.5, 0.5 ** 0.5]])
        np.testing.assert_allclose(angle, [np.pi / 2])

    def test_lengths_are_kept(self):
        a, b = planes(2, 30, 8)
        merged = baselines.merge_pair(a, b, 0, 0.5)
        for x, y in zip((a, b), merged):
            np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=2e-3)

    def test_retained_tokens(self):
        a, b = planes(2, 30, 8)
        angle = baselines.slerp(a, b, 0.5)[1]
        exact = np.all(baselines.merge_pair(a, b, 0.1, 0.5)[0] == a, axis=1)
        self.assertEqual(set(np.flatnonzero(exact)), set(np.argsort(angle)[-3:]))
        self.assertEqual(relative(b, baselines.merge_pair(a, b, 1, 0.5)[1]), 0)

    def test_bytes(self):
        x = planes(5, 100, 8)  # two pairs, and a first layer that stays
        pair = 90 * 2 * (8 + 2) + 10 * (2 * 2 * 8 + 4)
        self.assertEqual(baselines.merge_layers(x, 0, 0.1)[1], 2 * 100 * 8 + 2 * pair)
        self.assertEqual(baselines.merge_layers(x, 3, 0.1)[1], 2 * 3 * 100 * 8 + pair)


class Distortion(unittest.TestCase):
    def setUp(self):
        self.cache = {"K": [x.astype(np.float32) for x in planes(2, 20, 6)],
                      "V": [x.astype(np.float32) for x in planes(2, 20, 6)]}
        root = RANDOM.standard_normal((2, 2, 2, 3, 3))
        blocks = root @ root.swapaxes(-1, -2)
        self.metric = distortion.Metric(blocks[0], blocks[1])
        self.means = distortion.Means(4)
        self.means.add(self.cache)
        self.judge = distortion.Judge(self.cache, self.metric, self.means, 4)

    def changed(self, change):
        return {kind: [change(x) for x in self.cache[kind]] for kind in self.cache}

    def test_no_error(self):
        errors = self.judge.compare(self.cache).errors()
        self.assertEqual((errors.metric, errors.kinds), (0, {"K": 0, "V": 0}))

    def test_scaled(self):
        """Everything 1 % larger is an error of 1 %, in all planes."""
        errors = self.judge.compare(self.changed(lambda x: x * np.float32(1.01))).errors()
        np.testing.assert_allclose([*errors.planes["K"], *errors.planes["V"], *errors.kinds.values()], 0.01, rtol=1e-4)

    def test_mean_alone_restored(self):
        """Nothing but the mean: the whole of the centred energy is lost."""
        means = {kind: [np.tile(self.means.of(kind, i), (20, 1)) for i in range(2)] for kind in "KV"}
        self.assertAlmostEqual(self.judge.compare(means).errors().metric, 1, places=5)

    def test_cost_of_a_known_error(self):
        """One element of one row off by d costs d^2 M_ii."""
        other = self.changed(np.copy)
        other["V"][1][7, 4] += 0.5  # head 1, element 1
        cost = self.judge.compare(other).cost
        self.assertAlmostEqual(cost[7], 0.25 * self.metric.blocks["V"][1][1][1, 1], places=5)
        self.assertEqual(np.count_nonzero(cost), 1)

    def test_sinks_and_range(self):
        other = self.changed(np.copy)
        other["K"][0][3] += 1   # a sink
        other["K"][0][15] += 1
        self.assertGreater(self.judge.compare(other).errors().metric, 0)
        self.assertEqual(self.judge.compare(other).errors(15).metric, 0)

    def test_safetensors(self):
        header = b'{"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"__metadata__":{}}'
        data = struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2)
        np.testing.assert_array_equal(distortion.read_safetensors(data)["x"], [[1.5], [-2]])


class Header(unittest.TestCase):
    def test_geometry_of_the_shipped_model(self):
        path = pathlib.Path(__file__).resolve().parents[1] / "data" / "smollm2-135m.gguf"
        self.assertEqual(gguf_header.geometry(path), gguf_header.Geometry(
            layers=30, kv_heads=3, head_dim=64, n_rot=64, rope_base=100000.0, interleaved=True))


class Results(unittest.TestCase):
    def test_ratio_at_an_error(self):
        rows = [dict(ratio=4, error_metric_shared=0.01), dict(ratio=16, error_metric_shared=0.04)]
        self.assertAlmostEqual(report.ratio_at(rows, 0.02), 8)
        self.assertIsNone(report.ratio_at(rows, 0.05))

    def test_pooled(self):
        rows = [dict(method="dict", target=8, setting="", ratio=ratio, error_metric=error, error_k=error, error_v=error)
                for ratio, error in ((8, 0.3), (8, 0.4))]
        pooled, = report.pooled(rows)
        self.assertAlmostEqual(pooled["ratio"], 8)
        self.assertAlmostEqual(pooled["error_metric"], 0.125 ** 0.5)

    def test_files(self):
        row = dict(cache="c", tokens=100, method="dict", setting="", target=8, bytes=1000, ratio=8., error_metric=0.15,
                   error_metric_shared=0.15, error_k=0.1, error_v=0.2, reported_metric=None, planes_k=[0.1],
                   planes_v=[0.2])
        other = dict(row, target=16, ratio=16., error_metric=0.3, error_metric_shared=0.3)
        results = dict(model="m", date="", code="", caches=["c"], shared_tokens=100,
                       dictionaries=dict(dict=dict(dictionary_bytes=1, tokens=1)), rows=[row, other],
                       lengths=[row, other])
        with tempfile.TemporaryDirectory() as folder:
            report.write_all(pathlib.Path(folder), results)
            names = sorted(path.name for path in pathlib.Path(folder).iterdir())
        self.assertEqual(names, ["m-lengths.svg", "m-planes.csv", "m.csv", "m.json", "m.md", "m.svg"])

    def test_lengths_that_reach_no_error(self):
        row = dict(cache="c", tokens=100, method="dict", target=8, ratio=8., error_metric_shared=0.3)
        self.assertEqual(report.by_length([row], 0.15), {})
        text = "\n".join(report.lengths_section(dict(model="m", lengths=[row], shared_tokens=100)))
        self.assertNotIn(".svg", text)


class Plot(unittest.TestCase):
    def test_well_formed(self):
        series = [plot.Series("a < b", [(1, 0.1), (8, 0.3)], ("#000", "#fff")),
                  plot.Series("c", [(2, 0.2)], plot.MUTED)]
        text = plot.chart("A & B", "", plot.power_axis("x", [1, 8], str), plot.log_axis("y", [0.1, 0.3], str), series)
        xml.etree.ElementTree.fromstring(text)

    def test_labels_do_not_overlap(self):
        middles = plot.spread([(0, 200, 50), (10, 203, 50), (20, 201, 50), (300, 202, 50)])
        near = sorted(middles[:3])
        self.assertGreater(min(b - a for a, b in zip(near, near[1:])), plot.LABEL_HEIGHT - 0.1)
        self.assertEqual(middles[3], 202)


if __name__ == "__main__":
    unittest.main()
