"""`diffmf evaluate`, with a stand-in for the network."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from diffmf_model import published
from diffmf_model.evaluate import BASELINES, column_ranks, markdown_table, mean_ranks
from diffmf_model.images import luma, read_image, to_uint8, write_png
from diffmf_model.metrics import METRICS, evaluate_pair


def rows(markdown: str) -> dict[str, list[float]]:
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    assert lines[0] == ["method", *METRICS, "mean rank"]
    return {
        cells[0]: [float(cell.split(" ")[0].strip("*")) for cell in cells[1:]]
        for cells in lines[2:]
        if "–" not in cells
    }


def test_table_and_files(tmp_path, pairs, average, command):
    root = pairs(["a", "b", "c"])
    (tmp_path / "names.txt").write_text("c\na\n")
    other = tmp_path / "other"
    other.mkdir()
    for name in "ac":
        write_png(other / f"{name}.png", read_image(root / "ir" / f"{name}.png").flip(1))
    arguments = ("evaluate", "--data", root, "--names", tmp_path / "names.txt", "--methods", other)
    status, stdout, _ = command(*arguments, "--output", tmp_path / "out")
    assert status == 0
    assert "2 pairs, protocol cddfuse, images scored as written" in stdout.splitlines()[0]
    table = rows(stdout)
    assert list(table) == ["DIFF-MF", "other", *BASELINES]
    assert (tmp_path / "out/metrics.md").read_text() == stdout

    record = json.loads((tmp_path / "out/metrics.json").read_text())
    assert record["protocol"] == "cddfuse" and record["pairs"] == 2
    per_image = {each["method"]: each["per_image"] for each in record["methods"]}
    assert all(list(table) == ["c", "a"] for table in per_image.values())
    for name in "ac":
        ir, vi = (read_image(root / folder / f"{name}.png") for folder in ("ir", "vi"))
        fused = to_uint8((ir + luma(vi)) / 2)
        assert per_image["DIFF-MF"][name] == pytest.approx(evaluate_pair(fused, to_uint8(ir), to_uint8(vi)))
        assert per_image["other"][name] == pytest.approx(
            evaluate_pair(to_uint8(ir.flip(1)), to_uint8(ir), to_uint8(vi))
        )
    with open(tmp_path / "out/metrics.csv", newline="") as file:
        written = {row["method"]: row for row in csv.DictReader(file)}
    for method, scores in per_image.items():
        for column, metric in enumerate(METRICS):
            mean = (scores["a"][metric] + scores["c"][metric]) / 2
            assert float(written[method][metric]) == pytest.approx(mean, rel=1e-12)
            assert table[method][column] == pytest.approx(mean, abs=0.0051)
        assert float(written[method]["mean rank"]) == pytest.approx(table[method][-1], abs=0.0051)

    # An earlier evaluation's file is a method like any other, on any of its pairs; its own names are kept apart.
    (tmp_path / "names.txt").write_text("a\n")
    status, stdout, stderr = command(*arguments[:5], "--methods", tmp_path / "out/metrics.json")
    assert status == 0, stderr
    again = rows(stdout)
    assert list(again) == ["DIFF-MF", f"DIFF-MF ({tmp_path / 'out'})", "other", *BASELINES]
    assert again["DIFF-MF"] == again[f"DIFF-MF ({tmp_path / 'out'})"]
    shutil.copytree(other, tmp_path / "out" / "DIFF-MF")
    status, stdout, stderr = command(*arguments[:5], "--methods", tmp_path / "out" / "DIFF-MF")
    assert status == 0 and list(rows(stdout)) == ["DIFF-MF", f"DIFF-MF ({tmp_path / 'out'})", *BASELINES], stderr


def test_baselines_are_what_they_are_called(pairs):
    root = pairs(["a"])
    ir, vi = (read_image(root / folder / "a.png") for folder in ("ir", "vi"))
    a, b = (to_uint8(luma(image))[0].numpy().astype(np.float64) for image in (ir, vi))
    mean, maximum, detail = ((255 * fuse("a", ir, vi)[0]).numpy() for fuse in BASELINES.values())
    assert np.allclose(mean, np.round((a + b) / 2)) and np.allclose(maximum, np.maximum(a, b))
    ndimage = pytest.importorskip("scipy.ndimage")
    base = [ndimage.gaussian_filter(x, 2, mode="mirror", radius=8) for x in (a, b)]
    strongest = np.where(abs(a - base[0]) > abs(b - base[1]), a - base[0], b - base[1])
    expected = np.clip(np.maximum(*base) + strongest, 0, 255)
    assert np.abs(detail - expected).max() < 0.500001  # rounding to whole levels


def test_vifb_takes_the_visible_colours(tmp_path, pairs, average, command):
    root = pairs(["a"])
    status, stdout, _ = command("evaluate", "--data", root, "--protocol", "vifb", "--stretch")
    assert status == 0 and "protocol vifb, fused images min-max stretched" in stdout
    command("fuse", root / "ir/a.png", root / "vi/a.png", "--output", tmp_path / "colour" / "a.png")
    status, stdout, _ = command("evaluate", "--data", root, "--protocol", "vifb", "--methods", tmp_path / "colour")
    table = rows(stdout)
    assert table["DIFF-MF"] == table["colour"]


def test_mean_ranks_share_ties_and_put_nan_last():
    means = {
        "a": dict.fromkeys(METRICS, 3.0),
        "b": dict.fromkeys(METRICS, 2.0),
        "c": dict.fromkeys(METRICS, 2.0),
        "d": dict.fromkeys(METRICS, math.nan),
    }
    assert mean_ranks(means) == {"a": 1.0, "b": 2.5, "c": 2.5, "d": 4.0}
    means["b"] |= {"EN": 4.0, "SSIM": 9.0}  # SSIM is not ranked
    assert mean_ranks(means)["b"] == pytest.approx((1 + 7 * 2.5) / 8)
    assert mean_ranks(means)["c"] == pytest.approx((3 + 7 * 2.5) / 8)
    means["e"] = {"EN": 5.0}  # a published row with a single metric is ranked in that one
    assert column_ranks(means)["e"] == {"EN": 1.0} and mean_ranks(means)["e"] == 1.0
    assert column_ranks(means)["b"]["EN"] == 2.0 and column_ranks(means)["a"]["SD"] == 1.0


def test_the_best_is_bold_beside_nan_and_a_bar_in_a_name_is_no_column():
    means = {"DIFF-MF": dict.fromkeys(METRICS, math.nan), "a|b": dict.fromkeys(METRICS, 2.0)}
    means["c"] = dict.fromkeys(METRICS, 1.0)
    assert "| a\\|b | **2.00** (1) | **2.00** (1) |" in (text := markdown_table("t", means)) and "**nan**" not in text


def test_published_rows_of_the_same_pairs_are_ranked_and_others_are_not():
    tables = published.tables("TNO-25", "cddfuse", False)
    assert published.tables("TNO-25", "vifb", False) == published.tables("TNO-25", "cddfuse", True) == []
    assert {table.same_pairs for table in tables} == {True, False}
    means = {"DIFF-MF": dict.fromkeys(METRICS, 50.0)}
    text = markdown_table("t", means, tables)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert lines["DIFF-MF"].startswith("| DIFF-MF | **50.00** (1) |") and lines["DIFF-MF"].endswith("| **1.00** |")
    assert lines["*CDDFuse*"].startswith("| *CDDFuse* | 7.12 (2) | 46.00 (3) | 13.15 (3)")
    assert lines["*DIFF-MF, DIFF-MF paper, Table I*"].split(" | ")[1:3] == ["7.10", "63.03"]
    assert lines["*DIFF-MF, DIFF-MF paper, Table I*"].endswith("| – |")
    assert "55 TNO pairs, not listed there" in text
    text = markdown_table("t", means | {"mean (no learning)": {m: 60.0 for m in METRICS if m != "SF"}}, tables)
    expected = (
        "first among the 10 methods in 8 of 8 columns (EN, SD, SF, MI, VIF, AG, SCD, Qabf), and number 2 of 11 by"
    )
    assert f"DIFF-MF is {expected} mean rank" in text
    alone = markdown_table("t", means | {"mean (no learning)": dict.fromkeys(METRICS, 40.0)}, [])
    assert "DIFF-MF is number 1 of 2 by mean rank, the no-learning rules included. No other method" in alone


def test_published_rows_and_ablations_are_complete():
    counts = {
        name: sum(len(t.rows) for t in published.tables(name, "cddfuse", False)) for name in published.set_names()
    }
    assert counts == {"TNO-25": 17, "TNO-42": 8, "M3FD": 8, "DroneVehicle": 8}
    assert published.set_of([f"{i:02}" for i in range(1, 43)]) == "TNO-42" and published.set_of(["01"]) is None


def test_a_folder_of_sets_gives_three_tables(tmp_path, pairs, average, command, fails):
    root = tmp_path / "data"
    pairs([f"{i:02}" for i in range(1, 5)], root / "tno")
    pairs(["f1", "f2", "f3"], root / "roadscene")
    (root / "tno/tno25.txt").write_text("02\n04\n")
    (root / "roadscene/splits").mkdir()
    (root / "roadscene/splits/test.txt").write_text("f2\nf3\n")
    other = tmp_path / "other"
    other.mkdir()
    for i in range(1, 5):
        write_png(other / f"{i:02}.png", read_image(root / "tno/ir" / f"{i:02}.png"))
    status, stdout, stderr = command("evaluate", "--data", root, "--methods", other, "--output", tmp_path / "out")
    assert status == 0, stderr
    titles = [line.split(";")[0] for line in stdout.splitlines() if line.startswith("**")]
    assert [title.split(",")[0] for title in titles] == [
        "**TNO-2: 2 pairs",
        "**TNO-4: 4 pairs",
        "**RoadScene-2: 2 pairs",
    ]
    assert all("protocol cddfuse" in title for title in titles)
    assert stdout.count("| other |") == 2
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    assert record["tables"]["TNO-2"]["pairs"] == ["02", "04"] and record["tables"]["TNO-2"]["ranks"]["other"]
    per_image = {each["method"]: each["per_image"] for each in record["methods"]}
    assert set(per_image["DIFF-MF"]) == {"01", "02", "03", "04", "f2", "f3"} and len(per_image["other"]) == 4
    with open(tmp_path / "out/metrics.csv", newline="") as file:
        assert [row["set"] for row in csv.DictReader(file) if row["method"] == "other"] == ["TNO-2", "TNO-4"]
    again = command("evaluate", "--data", root, "--methods", tmp_path / "out/metrics.json")[1]
    assert again.count(f"| DIFF-MF ({tmp_path / 'out'}) |") == 3 and again.count("| other |") == 2
    assert "expected a single data set" in fails("evaluate", "--data", root, "--names", root / "tno/tno25.txt")
    (other / "01.png").unlink()
    assert "no fused image for 01" in fails("evaluate", "--data", root, "--methods", other)
    pairs(["z"], tmp_path / "stranger")
    assert "has none of the pairs" in fails("evaluate", "--data", root, "--methods", tmp_path / "stranger/ir")


def test_undefined_scores_are_null_in_the_json_file(tmp_path, average, command):
    for folder in ("ir", "vi"):
        (tmp_path / folder).mkdir()
        Image.new("L", (48, 48), 7).save(tmp_path / folder / "a.png")
    status, stdout, _ = command("evaluate", "--data", tmp_path, "--output", tmp_path / "out")
    assert status == 0 and "nan" in stdout
    text = (tmp_path / "out/metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["methods"][0]["per_image"]["a"]["SCD"] is None
    assert command("evaluate", "--data", tmp_path, "--methods", tmp_path / "out/metrics.json")[0] == 0


def test_bad_input(tmp_path, pairs, picture, average, fails):
    root = pairs(["a", "b"])
    data = ("evaluate", "--data", root)
    assert "gone: no such folder" in fails("evaluate", "--data", tmp_path / "gone")
    assert "gone.txt: cannot be read" in fails(*data, "--names", tmp_path / "gone.txt")
    (tmp_path / "names.txt").write_text("z\n")
    assert "no pair named z" in fails(*data, "--names", tmp_path / "names.txt")
    assert "expected a folder or a metrics.json file" in fails(*data, "--methods", tmp_path / "gone")
    assert "not a metrics file" in fails(*data, "--methods", tmp_path / "names.txt")
    (tmp_path / "m.json").write_text('{"method": "m", "protocol": "vifb", "per_image": {"a": {}}}')
    assert "not a metrics file" not in (message := fails(*data, "--methods", tmp_path / "m.json")), message
    method = tmp_path / "method"
    picture(method / "a.png")
    assert "no fused image for b" in fails(*data, "--methods", method)
    picture(method / "b.png", (50, 50))
    assert "method's b is 50x50" in fails(*data, "--methods", method)
    picture(method / "b.png")
    assert "method appears twice" in fails(*data, "--methods", method, method)
    assert "TNO-25 has another number of pairs" in fails(*data, "--published", "TNO-25")
    (tmp_path / "file").touch()
    assert "cannot write to this folder" in fails(*data, "--output", tmp_path / "file" / "out")
    tiny = pairs(["t"], tmp_path / "tiny", (40, 60))
    assert "t: metrics need at least 41 x 41" in fails("evaluate", "--data", tiny)
    (root / "vi/b.png").write_bytes(b"")
    assert "b.png: cannot be read" in fails(*data)


def test_published_scores_enter_the_table(tmp_path, data, average, command):
    published = data / "reference_metrics" / "tardal.json"
    if not published.is_file():
        pytest.skip(f"no {published}")
    names = tmp_path / "names.txt"
    names.write_text("17\n05\n")
    status, stdout, _ = command("evaluate", "--data", data / "tno", "--names", names, "--methods", published)
    assert status == 0
    per_image = json.loads(published.read_text())["per_image"]
    means = [(per_image["17"][metric] + per_image["05"][metric]) / 2 for metric in METRICS]
    assert rows(stdout)["tardal"][:-1] == pytest.approx(means, abs=0.0051)
