"""The table of many runs: what is averaged, what is kept apart, what is marked."""

import csv
import io
import json
import math
import re
import shutil
import statistics

import pytest

from finished import evaluated, pretrained
from sslzoo.errors import UserError
from sslzoo.report.found import read
from sslzoo.report.table import CSV, Cell, csv_text, markdown, tabulate


def table_of(folder):
    return tabulate(read(folder).runs)


def cells(table, score="knn_top1"):
    """Method and variant -> the cell of a score; fails where a row has two of them."""
    found = {}
    for row in table.rows:
        (column,) = [column for column in row.cells if column.score == score] or [None]
        if column:
            found[row.name] = row.cells[column]
    return found


# Cells


def test_mean_and_standard_deviation_are_those_over_seeds():
    cell, values = Cell(), [0.61, 0.64, 0.66]
    for seed, value in enumerate(values):
        cell.add(seed, value)
    mean = sum(values) / 3
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert cell.mean == pytest.approx(mean, rel=1e-12)
    assert cell.sd == pytest.approx(sd, rel=1e-12)
    assert cell.standard_error == pytest.approx(sd / math.sqrt(3), rel=1e-12)
    assert cell.seeds == 3


def test_two_runs_of_one_seed_are_one_seed():
    cell = Cell()
    for seed, value in ((0, 0.6), (0, 0.8), (1, 0.5)):
        cell.add(seed, value)
    assert cell.seeds == 2
    assert cell.values == pytest.approx([0.7, 0.5])
    assert cell.mean == pytest.approx(0.6)


def cell_of(*values, interval=None):
    cell = Cell()
    for seed, value in enumerate(values):
        cell.add(seed, value, interval)
    return cell


def test_a_difference_under_two_standard_errors_is_marked_and_one_above_is_not():
    best = cell_of(0.60, 0.62, 0.64)
    error = statistics.stdev([0.60, 0.62, 0.64]) / math.sqrt(3)
    for factor, mark in ((1.99, "~"), (2.01, "")):
        shift = factor * error * math.sqrt(2)
        assert cell_of(*(value - shift for value in (0.60, 0.62, 0.64))).against(best) == mark
    assert best.against(best) == ""


def test_one_seed_has_no_spread_and_tells_no_difference():
    best, other = cell_of(0.9), cell_of(0.1)
    assert best.sd is None
    assert best.standard_error is None
    assert other.against(best) == "?"
    assert cell_of(0.1, 0.11).against(best) == "?"


def test_the_luck_of_the_held_out_images_alone_can_show_that_two_runs_are_not_told_apart():
    best = cell_of(0.60, interval=[0.58, 0.62])
    assert cell_of(0.59, interval=[0.57, 0.61]).against(best) == "~"
    assert cell_of(0.40, interval=[0.38, 0.42]).against(best) == "?"  # the luck of training is still unknown


# Rows and columns


def test_seeds_of_one_configuration_are_one_row_and_configurations_are_rows_of_their_own(tmp_path):
    for seed, knn in ((0, 0.60), (1, 0.62)):
        pretrained(tmp_path / f"moco/{seed}", seed=seed, knn=knn)
        pretrained(tmp_path / f"fast/{seed}", seed=seed, knn=knn + 0.1, optim__lr=0.3)
    pretrained(tmp_path / "simclr", "simclr", knn=0.5)
    found = cells(table_of(tmp_path))
    assert found["moco, optim.lr=0.1"].values == [0.60, 0.62]
    assert found["moco, optim.lr=0.3"].values == pytest.approx([0.70, 0.72])
    assert found["simclr"].seeds == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"monitor__k": 200},
        {"monitor__temperature": 0.1},
        {"monitor__queries": 100},
        {"data__val_size": 99},
        {"data__label_fraction": 0.1},
        {"image_size": 16},
    ],
    ids=str,
)
def test_protocols_of_training_runs_are_never_averaged(tmp_path, changes):
    pretrained(tmp_path / "a", seed=0, knn=0.6)
    pretrained(tmp_path / "b", seed=1, knn=0.8, **changes)
    table = table_of(tmp_path)
    columns = {column for row in table.rows for column in row.cells}
    assert len(columns) == 2
    assert {cell.seeds for row in table.rows for cell in row.cells.values()} == {1}
    assert len(set(table.protocols.values())) == 2


@pytest.mark.parametrize(
    "changes",
    [{"task__k": 200}, {"task__temperature": 0.1}, {"data__label_fraction": 0.01}, {"task__protocol": "moco"}],
    ids=str,
)
def test_protocols_of_evaluations_are_never_averaged(tmp_path, changes):
    run = pretrained(tmp_path / "moco")
    same = {"task__k": 20, "task__temperature": 0.07, "task__protocol": "simclr", "data__label_fraction": 1.0}
    evaluated(tmp_path / "e/a", run, "lowshot", scores={"lowshot_top1": 0.3}, **same)
    evaluated(tmp_path / "e/b", run, "lowshot", scores={"lowshot_top1": 0.9}, **(same | changes))
    table = table_of(tmp_path)
    (row,) = table.methods
    shown = sorted((cell.mean, table.protocols[c]) for c, cell in row.cells.items() if c.task == "lowshot")
    assert [mean for mean, _ in shown] == [0.3, 0.9]
    assert shown[0][1] != shown[1][1]


def test_a_labelled_share_of_one_is_what_runs_meant_before_there_was_such_a_key(tmp_path):
    pretrained(tmp_path / "old", seed=0)
    pretrained(tmp_path / "new", seed=1, data__label_fraction=1.0, data__label_list=None)
    assert cells(table_of(tmp_path))["moco"].seeds == 2


@pytest.mark.parametrize("name", ["folder", "npz", "imagenet"])
def test_two_folders_of_images_are_two_sets(tmp_path, name):
    for seed in (0, 1):
        pretrained(tmp_path / str(seed), seed=seed, data__name=name, data__root=f"/data/{seed}")
    assert {cell.seeds for row in table_of(tmp_path).rows for cell in row.cells.values()} == {1}


def test_a_set_that_was_moved_is_the_same_set(tmp_path):
    for seed in (0, 1):
        pretrained(tmp_path / str(seed), seed=seed, data__name="cifar10", data__root=f"/data/{seed}")
    assert cells(table_of(tmp_path))["moco"].seeds == 2


def test_data_of_other_names_are_tables_of_their_own(tmp_path):
    pretrained(tmp_path / "a", knn=0.6)
    pretrained(tmp_path / "b", knn=0.7, summary={"data": "cifar10"}, data__name="cifar10")
    table = table_of(tmp_path)
    assert sorted(table.sets) == ["cifar10", "photos"]
    assert markdown(table).count("## ") == 2


# Evaluations


def test_evaluations_join_the_row_of_their_backbone_under_its_seed(tmp_path):
    for seed in (0, 1):
        run = pretrained(tmp_path / f"moco/{seed}", seed=seed)
        evaluated(tmp_path / f"linear/{seed}", run, scores={"linear_top1": (0.7, 0.8)[seed], "linear_top5": 0.9})
        other = pretrained(tmp_path / f"fast/{seed}", seed=seed, optim__lr=0.3)
        evaluated(tmp_path / f"linear/fast{seed}", other, scores={"linear_top1": 0.5, "linear_top5": 0.8})
    found = cells(table_of(tmp_path), "linear_top1")
    assert found["moco, optim.lr=0.1"].by_seed == {0: [0.7], 1: [0.8]}  # all evaluations had seed 0
    assert found["moco, optim.lr=0.3"].by_seed == {0: [0.5], 1: [0.5]}


def test_evaluations_find_their_run_after_both_were_moved(tmp_path):
    run = pretrained(tmp_path / "here/moco", optim__lr=0.3)
    evaluated(tmp_path / "here/linear", run, scores={"linear_top1": 0.7})
    shutil.move(tmp_path / "here", tmp_path / "there")
    (row,) = table_of(tmp_path / "there").methods
    assert {column.score for column in row.cells} == {"knn_top1", "linear_top1"}


def test_a_backbone_trained_elsewhere_keeps_its_configuration(tmp_path):
    for seed in (0, 1):
        run = pretrained(tmp_path / f"far/{seed}", seed=seed, optim__lr=0.3)
        evaluated(tmp_path / f"near/{seed}", run, scores={"linear_top1": 0.7})
    (row,) = table_of(tmp_path / "near").methods
    assert row.cells.popitem()[1].seeds == 2
    assert row.recipe["optim.lr"] == 0.3
    assert {column.score for column in table_of(tmp_path / "near").columns} == {"linear_top1"}


def test_a_backbone_without_its_run_has_a_row_by_its_path(tmp_path):
    evaluated(tmp_path / "a", tmp_path / "gone/1", scores={"linear_top1": 0.7})
    evaluated(tmp_path / "b", tmp_path / "gone/2", scores={"linear_top1": 0.9})
    assert [cell.seeds for cell in cells(table_of(tmp_path), "linear_top1").values()] == [1, 1]


def test_random_and_timm_backbones_have_rows_of_their_own(tmp_path):
    run = pretrained(tmp_path / "moco")
    scores = {"linear_top1": 0.7}
    evaluated(tmp_path / "e/own", run, scores=scores)
    for seed in (0, 1):
        evaluated(tmp_path / f"e/random{seed}", "random", seed=seed, method="random", scores={"linear_top1": 0.3})
    evaluated(tmp_path / "e/timm", "timm/resnet50", method="timm/resnet50", scores={"linear_top1": 0.8})
    untrained = {"linear_top1": 0.2, "pretrained": False}
    evaluated(tmp_path / "e/empty", "timm/resnet50", method="timm/resnet50", scores=untrained)
    table = table_of(tmp_path)
    found = cells(table, "linear_top1")
    assert {name: cell.seeds for name, cell in found.items()} == {
        "timm/resnet50": 1,
        "moco": 1,
        "timm/resnet50, random init": 1,
        "random init": 2,
    }
    assert next(row for row in table.rows if row.name == "random init").baseline
    assert cells(table)["random init"].mean == 0.5  # the start of the training run, same encoder, same row


def test_fine_tuning_belongs_to_the_backbone_it_began_with_and_distillation_to_its_teachers(tmp_path):
    run = pretrained(tmp_path / "moco", seed=3)
    tuned = tmp_path / "e/tuned"
    own = str(tuned / "backbone.safetensors")
    scores = {"finetune_top1": 0.8, "backbone": own, "initial_backbone": str(run / "backbone.safetensors")}
    evaluated(tuned, run, "finetune", scores=scores)
    student = {"distill_top1": 0.75, "backbone": str(tmp_path / "e/student/backbone.safetensors")}
    evaluated(
        tmp_path / "e/student", run, "distill", scores=student | {"teacher": str(tuned)}, task__teacher=str(tuned)
    )
    evaluated(tmp_path / "e/again", tuned, "knn", scores={"knn_top1": 0.9})
    rows = {row.name: {c.score: cell.by_seed for c, cell in row.cells.items()} for row in table_of(tmp_path).methods}
    assert rows["moco"]["finetune_top1"] == {3: [0.8]}
    assert rows["moco"]["distill_top1"] == {3: [0.75]}
    assert rows["moco + finetune"] == {"knn_top1": {3: [0.9]}}


def test_students_of_other_encoders_are_never_averaged(tmp_path):
    run = pretrained(tmp_path / "moco")
    for name in ("resnet18", "resnet50"):
        told = {"distill_top1": 0.7, "teacher": str(run)}
        evaluated(tmp_path / name, run, "distill", scores=told, encoder__name=name)
    table = table_of(tmp_path)
    said = [table.protocols[column] for column in table.columns if column.task == "distill"]
    assert sorted(said) == ["name=resnet18", "name=resnet50"]


def test_a_run_whose_backbone_is_its_own_ends_the_search(tmp_path):
    folder = tmp_path / "odd"
    evaluated(folder, folder, "finetune", scores={"finetune_top1": 0.8})
    assert cells(table_of(tmp_path), "finetune_top1")


def test_settings_and_costs_are_no_scores_and_unknown_scores_are_shown(tmp_path):
    run = pretrained(tmp_path / "moco")
    told = {
        "linear_top1": 0.7,
        "linear_top1_interval": [0.6, 0.8],
        "lr": 0.1,
        "loss": 1.0,
        "flops_lr": 2.0,
        "ratio": 3.25,
    }
    evaluated(
        tmp_path / "e", run, scores=told | {"epochs": 5.0, "classes": 10, "note": "x", "broken_top1": float("nan")}
    )
    table = table_of(tmp_path)
    assert [column.score for column in table.columns if column.task == "linear"] == ["linear_top1", "ratio"]
    assert "linear: ratio" in markdown(table)
    assert "3.25 ± - (1)" in markdown(table)


def test_every_number_of_shots_is_a_protocol_and_only_the_whole_has_the_interval(tmp_path):
    run = pretrained(tmp_path / "moco")
    draws = {str(k): {"mean": k / 100, "sd": 0.01, "top1": [k / 100]} for k in (1, 8, 16)}
    told = {"lowshot": draws, "lowshot_top1": 0.9, "lowshot_top1_interval": [0.8, 1.0], "lowshot_cost": 10.0}
    evaluated(tmp_path / "e", run, "lowshot", scores=told, task__shots=[1, 8, 16], task__samples=5)
    table = table_of(tmp_path)
    columns = [column for column in table.columns if column.task == "lowshot"]
    assert [table.protocols[column] for column in columns] == ["shots=1", "shots=8", "shots=16", "shots=all"]
    (row,) = table.methods
    assert [row.cells[column].mean for column in columns] == [0.01, 0.08, 0.16, 0.9]
    assert [row.cells[column].interval for column in columns] == [None, None, None, (0.8, 1.0)]


def test_where_features_are_kept_and_what_else_is_reported_is_no_protocol(tmp_path):
    for seed, cache in ((0, "auto"), (1, "/tmp")):
        run = pretrained(tmp_path / f"moco/{seed}", seed=seed)
        told = {"knn_top1": 0.6, "knn_grid": {"k=1,T=0.1": 0.5}}
        changes = {"task__k": 20, "task__cache": cache, "task__grid_k": [1] * (1 + seed), "data__workers": seed}
        evaluated(tmp_path / f"e/{seed}", run, "knn", scores=told, **changes)
    (row,) = table_of(tmp_path).methods
    assert {(column.task, cell.seeds) for column, cell in row.cells.items()} == {("pretrain", 2), ("knn", 2)}


# Order and files


def test_the_best_comes_first_and_baselines_last(tmp_path):
    for method, knn in (("simclr", 0.5), ("moco", 0.7), ("byol", 0.3)):
        pretrained(tmp_path / method, method, knn=knn)
    table = table_of(tmp_path)
    assert [row.name for row in table.rows] == ["moco", "simclr", "byol", "random init", "raw pixels"]
    assert table.best[table.columns[0]].mean == 0.7


def test_of_keypoints_less_distance_is_better_and_settings_are_no_scores(tmp_path):
    for method, nme, pck in (("simclr", 0.2, 0.7), ("moco", 0.125, 0.8)):
        run = pretrained(tmp_path / method, method)
        scores = {"nme": nme, "pck": pck, "pck_at": 0.1, "scored_points": 60, "normalise": "box"}
        evaluated(tmp_path / "e" / method, run, "keypoints", scores=scores, task__model="heatmap")
    table = table_of(tmp_path)
    columns = {column.score: column for column in table.columns if column.task == "keypoints"}
    assert set(columns) == {"nme", "pck"}
    assert table.best[columns["nme"]].mean == 0.125
    assert table.best[columns["pck"]].mean == 0.8
    text = markdown(table)
    assert "| keypoints: NME, % (model=heatmap) | keypoints: PCK, % (model=heatmap) |" in text
    assert re.search(r"\| moco .* 12.5 ± - \(1\) \| 80.0 ± - \(1\) \|", text)


def test_detectors_are_scored_in_percent_of_precision(tmp_path):
    run = pretrained(tmp_path / "moco")
    evaluated(
        tmp_path / "e", run, "detect", scores={"map": 0.25, "map_50": 0.5, "boxes_per_image": 7.5, "map_75": None}
    )
    text = markdown(table_of(tmp_path))
    assert "| detect: mAP, % | detect: mAP 50, % |" in text
    assert "| 25.0 ± - (1) | 50.0 ± - (1) |" in text


def test_segmenters_are_scored_in_percent_of_overlap_and_models_are_kept_apart(tmp_path):
    run = pretrained(tmp_path / "moco")
    for model, miou in (("fcn", 0.3125), ("fpn", 0.5)):
        scores = {"miou": miou, "pixel_accuracy": 0.9, "classes": 5, "iou": [0.1, 0.2]}
        evaluated(tmp_path / "e" / model, run, "segment", scores=scores, task__model=model)
    text = markdown(table_of(tmp_path))
    for model, miou in (("fcn", "31.2"), ("fpn", "50.0")):
        assert f"segment: mIoU, % (model={model})" in text
        assert f"| {miou} ± - (1) |" in text
    assert "segment: pixel accuracy, %" in text


def selftrained(folder, init, student=0.4, seed=0, **changes):
    """A run of task=selftrain with the runs of teacher, student and control in it."""
    scores = {"of": "detect", "init": str(init), "map": student, "label_fraction": 1.0, "gain_at_equal_steps": -0.05}
    run = evaluated(folder, "-", "selftrain", seed, scores=scores, **{"augment": "s1", **changes})
    summary = json.loads((run / "summary.json").read_text())
    del summary["backbone"]
    (run / "summary.json").write_text(json.dumps(summary))
    for part in ("teacher", "student", "control"):
        evaluated(folder / part, "random", "detect", seed, scores={"map": 0.9})
    (folder / "pseudo").mkdir()
    (folder / "pseudo" / "summary.json").write_text(json.dumps({"threshold": 0.5, "images": 3}))
    return run


def test_self_training_is_one_score_of_its_start_and_its_parts_are_no_runs(tmp_path):
    run = pretrained(tmp_path / "moco")
    selftrained(tmp_path / "s" / "moco", run / "backbone.safetensors", 0.4)
    selftrained(tmp_path / "s" / "more", run / "backbone.safetensors", 0.6, augment="s4")
    selftrained(tmp_path / "s" / "random", "random", 0.3)
    unfinished = selftrained(tmp_path / "s" / "cut", "random", 0.3)
    (unfinished / "summary.json").unlink()
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "summary.json").write_text(json.dumps({"task": "selftrain", "grid": "augment", "cells": {}}))
    found = read(tmp_path)
    assert {run.task for run in found.runs} == {"pretrain", "selftrain"}
    assert not found.broken
    table = tabulate(found.runs)
    rows = {row.name: row for row in table.rows}
    maps = {dict(c.settings)["augment"]: c for c in table.columns if (c.task, c.score) == ("selftrain", "map")}
    assert {augment: rows["moco"].cells[c].mean for augment, c in maps.items()} == {"s1": 0.4, "s4": 0.6}
    assert rows["random init"].cells[maps["s1"]].mean == 0.3
    text = markdown(table)
    assert "| selftrain: gain at equal steps, % (augment=s1" in text
    assert "| -5.0 ± - (1) |" in text
    assert "selftrain: mAP, % (augment=s4" in text


def test_random_starts_of_other_encoders_are_other_baselines(tmp_path):
    pretrained(tmp_path / "moco", start=0.5)
    pretrained(tmp_path / "cmc", "cmc", start=0.3, encoder___target_="sslzoo.blocks.LabEncoder")
    found = cells(table_of(tmp_path))
    assert found["random init, Encoder"].mean == 0.5
    assert found["random init, LabEncoder"].mean == 0.3


def test_markdown_and_csv_say_the_same(tmp_path):
    for seed, knn in ((0, 0.60), (1, 0.64)):
        pretrained(tmp_path / f"moco/{seed}", seed=seed, knn=knn)
        pretrained(tmp_path / f"simclr/{seed}", "simclr", seed=seed, knn=knn - 0.005)
    pretrained(tmp_path / "byol", "byol", knn=0.55)
    table = table_of(tmp_path)
    text = markdown(table)
    assert "kNN top-1, % (in training, k=20, T=0.07)" in text
    assert "| moco | 62.0 ± 2.8 (2) | 2 |" in text
    assert "| simclr | 61.5 ± 2.8 (2) ~ | 2 |" in text
    assert "| byol | 55.0 ± - (1) ? | 1 |" in text
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(csv_text(table)))}
    assert set(lines["moco"]) == set(CSV)
    assert float(lines["moco"]["mean"]) == pytest.approx(0.62)
    assert lines["byol"]["sd"] == lines["byol"]["standard_error"] == "-"
    assert (lines["simclr"]["mark"], lines["byol"]["mark"], lines["moco"]["seeds"]) == ("~", "?", "2")
    assert lines["moco"]["versions"] == "sslzoo 0.1.0, torch 2.15.0"
    assert lines["moco"]["config_hash"] == table.methods[0].hash != "-"


# Reading


def test_a_pattern_names_folders_and_a_run_is_read_once(tmp_path):
    for seed in (0, 1):
        pretrained(tmp_path / f"zoo/moco/{seed}", seed=seed)
        pretrained(tmp_path / f"zoo/byol/{seed}", "byol", seed=seed)
    assert len(read(tmp_path).runs) == 4
    assert [run.seed for run in read(f"{tmp_path}/zoo/*/0").runs] == [0, 0]
    assert len(read(f"{tmp_path}/zoo/**").runs) == 4
    assert [run.method for run in read(f"{tmp_path}/zoo/byol").runs] == ["byol"] * 2
    assert len(read(f"{tmp_path}/zoo/moco/0/summary*").runs) == 1


def test_earlier_comparisons_are_no_runs(tmp_path):
    pretrained(tmp_path / "moco")
    evaluated(tmp_path / "compare", "-", "compare")
    assert [run.task for run in read(tmp_path).runs] == ["pretrain"]


def test_unfinished_runs_are_named(tmp_path):
    pretrained(tmp_path / "done")
    (pretrained(tmp_path / "going") / "summary.json").unlink()
    assert read(tmp_path).unfinished == [tmp_path / "going"]


def test_broken_summaries_are_named_and_left_out(tmp_path):
    pretrained(tmp_path / "good")
    for name, content in (("cut", '{"task": "pre'), ("list", "[1]"), ("foreign", '{"loss": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(content)
    found = read(tmp_path)
    assert len(found.runs) == 1
    assert [line.partition("summary.json")[0] for line in found.broken] == [
        f"{tmp_path}/{n}/" for n in ("cut", "foreign", "list")
    ]
    assert "is damaged" in found.broken[0]
    assert "names no task and method" in found.broken[1]


@pytest.mark.parametrize("content", ["{", "a: [", "\t:"])
def test_a_run_with_a_damaged_configuration_still_has_its_scores(tmp_path, content):
    for seed in (0, 1):
        (pretrained(tmp_path / str(seed), seed=seed) / "config.yaml").write_text(content)
    assert [cell.seeds for name, cell in cells(table_of(tmp_path)).items() if name.startswith("moco")] == [1, 1]


def test_damaged_curves_are_no_curves(tmp_path):
    folder = pretrained(tmp_path / "a")
    (folder / "metrics.csv").write_text("step,loss\none,two\n")
    assert read(tmp_path).runs[0].rows == []


@pytest.mark.parametrize(
    ("where", "told"),
    [
        (None, "task=compare needs runs="),
        ("nowhere", "runs=nowhere is no folder"),
        ("nowhere/*", r"runs=nowhere/\* is no folder"),
    ],
)
def test_a_folder_that_is_not_there_is_said(where, told):
    with pytest.raises(UserError, match=told):
        read(where)


def test_a_folder_without_a_finished_run_is_said_and_so_is_what_is_unfinished(tmp_path):
    with pytest.raises(UserError, match=r"has no summary\.json below it"):
        read(tmp_path)
    (pretrained(tmp_path / "going") / "summary.json").unlink()
    with pytest.raises(UserError, match="going: not finished"):
        read(tmp_path)
    (tmp_path / "going/summary.json").write_text("{")
    with pytest.raises(UserError, match=r"going/summary.json is damaged"):
        read(tmp_path)


def test_every_seed_has_its_own_hash_in_its_summary_and_one_in_the_table(tmp_path):
    hashes = {
        json.loads((pretrained(tmp_path / s, seed=int(s)) / "summary.json").read_text())["config_hash"] for s in "01"
    }
    assert len(hashes) == 2
    assert len({row.hash for row in table_of(tmp_path).methods}) == 1
