"""Reports: marks, blanks, whole files or none."""

import json
import math
import os
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from pyrovae import plots, report
from pyrovae.compare import compare
from pyrovae.guides import AmortizedMeanField
from pyrovae.inference import EM, Exact, Gibbs, Importance, Variational
from pyrovae.models import toy


@pytest.fixture(scope="module")
def both():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    net = toy.belief_net(visible=9, hidden=3)
    torch.manual_seed(1)
    x = net.sample(12)
    guide = AmortizedMeanField(net)
    learners = {
        "exact EM": EM(Exact(), 3, penalty=0.1),
        "MC | EM": EM(Gibbs(5, 1, 2), 2),
        "VI": Variational(guide, num_steps=4),
    }
    learning = compare(net, x, learners, x_test=x[:5])
    methods = {
        "exact": Exact(),
        "Gibbs": Gibbs(60, 2, 5),
        "VI": Variational(guide, num_samples=50),
        "IS": Importance(guide, 50),
    }
    inference = compare(net, x, methods, learn=False)
    torch.set_default_dtype(before)
    return {"learning": learning, "inference": inference}


def column(table, key):
    index = [k for k, _ in table.columns].index(key)
    return {row[0].text: row[index] for row in table.rows}


class TestTables:
    def test_marks(self, both):
        (table,) = report.tables(both["learning"])
        own = column(table, "own_bound")
        assert (own["exact EM"].mark, own["VI"].mark) == ("exact", "lower")
        assert column(table, "gap")["VI"].mark == "estimate"
        assert column(table, "log_p_train")["VI"].mark == "exact"
        (table,) = report.tables(both["inference"])
        evidence = column(table, "log_evidence")
        assert (evidence["exact"].marked[0], evidence["VI"].marked[0], evidence["IS"].marked[0]) == ("=", "≥", "≥")
        assert column(table, "marginal_error")["Gibbs"].mark == "estimate"
        assert column(table, "marginal_error")["exact"].marked == "= 0"

    def test_blanks(self, both):
        (table,) = report.tables(both["learning"])
        assert column(table, "own_bound")["MC | EM"].marked == ""
        assert column(table, "difference")["exact EM"].marked == ""
        (table,) = report.tables(both["inference"])
        for key in ("log_evidence", "gap", "kl", "pareto_k"):
            assert column(table, key)["Gibbs"].marked == "", key
        assert column(table, "kl")["IS"].marked == ""

    def test_markdown(self, both):
        text = report.markdown(both["learning"])
        assert all(mark in text for mark in ("= -", "≥ -", "≈ ", " ± "))
        assert "nats per datum" in text
        assert "rows: 12 training, 5 test" in text
        assert "seeds: 0" in text
        assert "penalty: 0, 0.1" in text
        assert "pyro-ppl" in text
        assert "MC \\| EM" in text, "a bar in a name would break the table"
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == 1

    def test_no_nan(self, both):
        for comparison in both.values():
            for text in (report.markdown(comparison), report.html_tables(comparison), comparison._repr_html_()):
                assert not re.search(r"\b(nan|None|inf)\b", text, re.IGNORECASE)
        frame = both["learning"].learning
        assert frame["own_bound"].isna().any(), "the check has something to catch"

    @pytest.mark.parametrize(
        ("value", "stderr", "text"),
        [
            (-18.82486, 0.0123, "-18.825 ± 0.012"),
            (-18.82486, 1.23, "-18.8 ± 1.2"),
            (1234.5, 123.0, "1234 ± 123"),
            (0.5, None, "0.500"),
            (0.5, 0.0, "0.500"),
            (0.5, math.nan, "0.500"),
            (1e-14, None, "0"),
            (2.5e-5, None, "2.5e-05"),
            (None, 0.1, ""),
            (math.nan, 0.1, ""),
        ],
    )
    def test_number(self, value, stderr, text):
        assert report.number(value, stderr) == text


class TestSave:
    def test_files(self, both, tmp_path):
        folder = both["inference"].save(tmp_path / "deep" / "out")
        found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        posteriors = [f"posteriors/{name}.nc" for name in ("exact", "gibbs", "is", "vi")]
        assert found == ["comparison.json", "comparison.md", "errors.png", "inference.csv", "marginals.png", *posteriors]
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
        frame = pd.read_csv(folder / "inference.csv")
        assert frame["gap"].isna().sum() == 1
        assert frame["gap"][2] == pytest.approx(both["inference"].inference["gap"][2], abs=1e-12)

    def test_json(self, both, tmp_path):
        content = json.loads((both["learning"].save(tmp_path) / "comparison.json").read_text(), parse_constant=pytest.fail)
        assert content["metadata"]["seeds"] == [0]
        assert "torch" in content["metadata"]["versions"]
        assert content["learning"][1]["own_bound"] is None
        run = content["runs"]["exact EM"][0]
        assert run["penalty"] == 0.1
        assert [entry["step"] for entry in run["history"]] == [0, 1, 2, 3]

    def test_netcdf(self, both, tmp_path):
        import xarray

        folder = both["inference"].save(tmp_path)
        with xarray.open_dataset(folder / "posteriors" / "gibbs.nc", group="posterior", engine="h5netcdf") as gibbs:
            assert gibbs["h1"].shape == (2, 60, 12, 3)
            drawn = torch.as_tensor(gibbs["h1"].values.astype(float))
        assert torch.equal(drawn, both["inference"].posteriors["Gibbs"].draws["h1"])

    def test_slugs_that_coincide(self, both, tmp_path):
        posterior = both["inference"].posteriors["VI"]
        named = replace(both["inference"], reference=None, posteriors=dict.fromkeys(("a b", "a-b", "A b", "a-b-2"), posterior))
        assert len(list((named.save(tmp_path / "one") / "posteriors").iterdir())) == 4
        report.write_report({"x y": named, "x-y": named}, tmp_path / "two", "title")
        assert len(list((tmp_path / "two" / "posteriors").iterdir())) == 8
        assert len(list((tmp_path / "two").glob("*inference.csv"))) == 2

    def test_random_state_stays(self, both, tmp_path):
        before = torch.get_rng_state()
        both["inference"].posteriors["VI"].to_arviz()
        assert not torch.equal(before, torch.get_rng_state()), "the draws would move it"
        before = torch.get_rng_state()
        both["inference"].save(tmp_path)
        assert torch.equal(before, torch.get_rng_state())

    def test_updates(self, both, tmp_path):
        (tmp_path / "mine.txt").write_text("stays")
        (tmp_path / "learning.csv").write_text("old")
        both["learning"].save(tmp_path)
        assert (tmp_path / "mine.txt").read_text() == "stays"
        assert (tmp_path / "learning.csv").read_text().startswith("method,")
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_whole_or_nothing(self, both, tmp_path, monkeypatch, exists, error):
        folder = tmp_path / "out"
        if exists:
            folder.mkdir()
            (folder / "learning.csv").write_text("old")

        def fails(*args, **kwargs):
            raise error("midway")

        monkeypatch.setattr(plots, "learned", fails)
        with pytest.raises(error, match="midway"):
            both["learning"].save(folder)
        assert sorted(p.name for p in tmp_path.rglob("*")) == (["learning.csv", "out"] if exists else [])
        if exists:
            assert (folder / "learning.csv").read_text() == "old"

    def test_unwritable(self, both, tmp_path):
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(OSError, match="expected a folder"):
                report.check_writable(folder)
            with pytest.raises(OSError, match="expected a folder"):
                both["learning"].save(folder)
        report.check_writable(tmp_path / "not" / "yet" / "there")
        assert os.listdir(tmp_path) == ["file"]


@pytest.fixture(scope="module")
def page(both, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    samples = {"data": torch.ones(4, 9), "exact EM": torch.zeros(4, 9)}
    return report.write_report(both, folder, "A <net> & more", samples=samples, notes=["A note with <b>."])


class TestPage:
    def test_self_contained(self, page):
        text = page.read_text()
        assert page.name == "report.html"
        assert not re.search(r"(?:src|href|srcset)=(?![\"']?data:)", text)
        assert "http" not in text
        assert "@import" not in text
        assert "<script" not in text
        assert text.count("data:image/png;base64,") == 2 * 5

    def test_marks_and_words(self, page):
        text = page.read_text()
        for mark in ("exact", "lower", "upper", "estimate"):
            assert f'class="m {mark}"' in text
        assert "in expectation where a ± stands" in text
        assert "A &lt;net&gt; &amp; more" in text
        assert "A note with &lt;b&gt;." in text
        assert "prefers-color-scheme:dark" in text
        assert "@media print" in text
        assert 'name="viewport"' in text
        assert "pyro-ppl" in text
        assert "num_steps=4" in text
        assert not re.search(r"\b(nan|None)\b", re.sub(r"base64,[^\"]*", "", text))

    def test_other_files(self, page):
        names = {p.name for p in page.parent.iterdir()}
        assert {"learning.csv", "inference.csv", "comparison.json", "comparison.md", "samples.png", "posteriors"} <= names
        assert set(json.loads((page.parent / "comparison.json").read_text())) == {"learning", "inference"}


def test_without_anything_exact(both, tmp_path):
    """No reference, no exact values: tables and files with blanks, and no plots of errors."""
    frame = both["inference"].inference.assign(gap=None, gap_se=None, kl=None, marginal_error=None)
    bare = replace(both["inference"], inference=frame, reference=None)
    folder = bare.save(tmp_path)
    assert not list(folder.glob("*.png"))
    assert "None" not in (folder / "comparison.md").read_text()
