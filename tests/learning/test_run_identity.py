"""What makes a run another run, and what leaves it the same."""

import json
import os
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from MILS import build_mil
from tests.cohort import write_cohort
from tests.learning.runs import assert_same, contents, leave_unfinished, make_cv, small
from utils.bags.inventory import FileRecord
from utils.core.files import read_json, write_text
from utils.learning import jobs
from utils.learning.run_identity import settings_identity, slides_by_time
from utils.mil_dataset import MILDataset


class TestFolder:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"seed": 6}, "seed"),
            ({"n_inner": 3}, "n_inner"),
            ({"n_outer": 2}, "n_outer"),
            ({"epochs": 4}, "training"),
            ({"lr": 1e-3}, "training"),
            ({"model_factory": lambda: small(hidden_dim=8)}, "model"),
            ({"model_factory": lambda: small("meanPool")}, "model"),
        ],
    )
    def test_another_configuration_moves_the_old_run_aside(self, changes, named, dataset, tmp_path, unfitted, aloud):
        make_cv(dataset, tmp_path / "run").run()
        first = contents(tmp_path / "run")
        trained = len(unfitted.states)
        make_cv(dataset, tmp_path / "run", **changes).run()
        assert_same(contents(tmp_path / "run.1"), first)
        assert len(unfitted.states) > trained
        assert read_json(tmp_path / "run" / "run.json")["finished"]
        assert f"held another run ({named} differs); moved to {tmp_path / 'run.1'}" in aloud.text

    @pytest.mark.parametrize("feed", [{"chunk_size": 10}, {"mode": "full"}])
    def test_another_feed_is_another_run(self, feed, cohort, dataset, tmp_path, unfitted):
        make_cv(dataset, tmp_path / "run").run()
        make_cv(MILDataset(*cohort, **({"chunk_size": 20} | feed)), tmp_path / "run").run()
        assert (tmp_path / "run.1" / "outputs.json").is_file()

    @pytest.mark.parametrize("what", ["features", "label", "patient"])
    def test_changed_data_is_another_run(self, what, tmp_path, unfitted):
        csv_path, features = write_cohort(tmp_path / "cohort", patches=(20, 20))
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        if what == "features":
            path = sorted(features.iterdir())[3]
            other = write_cohort(tmp_path / "other", patches=(20, 20), seed=1)[1] / path.name
            before = path.stat()
            path.write_bytes(other.read_bytes())
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
            assert path.stat().st_size == before.st_size
        elif what == "label":
            text = csv_path.read_text()
            csv_path.write_text(text.replace("P000-S1,benign", "P000-S1,malignant"))
        else:
            csv_path.write_text(csv_path.read_text().replace("P000,P000-S2", "P002,P000-S2"))
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        assert (tmp_path / "run.1" / "outputs.json").is_file()

    def test_changed_features_are_named(self, tmp_path, unfitted, aloud):
        csv_path, features = write_cohort(tmp_path / "cohort", patches=(20, 20))
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        path = sorted(features.iterdir())[3]
        path.write_bytes((write_cohort(tmp_path / "other", patches=(20, 20), seed=1)[1] / path.name).read_bytes())
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        assert f"held another run (features of {path.stem} differs)" in aloud.text

    @pytest.mark.parametrize("is_finished", [True, False])
    def test_files_that_were_only_touched_leave_a_run_what_it_is(
        self, is_finished, tmp_path, unfitted, monkeypatch, aloud
    ):
        csv_path, features = write_cohort(tmp_path / "cohort", patches=(5, 50))
        cv = make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run")
        cv.run() if is_finished else leave_unfinished(cv)
        for path in features.iterdir():
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
        monkeypatch.setattr(jobs, "fit", None)
        read = FileRecord.of
        reads: list[str] = []
        monkeypatch.setattr(FileRecord, "of", lambda wsi_id, *rest: reads.append(wsi_id) or read(wsi_id, *rest))
        for times in (1, 2):
            make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
            assert len(reads) == 24, f"read in run {times}"
        assert not (tmp_path / "run.1").exists()

    @pytest.mark.parametrize("is_finished", [True, False])
    def test_a_run_of_an_earlier_version_goes_on(self, is_finished, dataset, tmp_path, unfitted, monkeypatch, aloud):
        """It knew the feature files by size and time, and nothing of standardising."""
        cv = make_cv(dataset, tmp_path / "run")
        cv.run() if is_finished else leave_unfinished(cv)
        record = read_json(tmp_path / "run" / "run.json")
        del record["identity"]["features"], record["identity"]["standardized"]
        record["identity"]["slides"] = slides_by_time(cv.dataset)
        write_text(tmp_path / "run" / "run.json", json.dumps(record))
        (tmp_path / "run" / "features.csv").unlink()
        monkeypatch.setattr(jobs, "fit", None)
        monkeypatch.setattr(FileRecord, "of", None)
        make_cv(dataset, tmp_path / "run").run()
        assert not (tmp_path / "run.1").exists()
        assert read_json(tmp_path / "run" / "run.json")["identity"] == record["identity"]

    @pytest.mark.parametrize("lacking", ["keep", "least_steps"])
    def test_a_run_that_knew_no_such_setting_is_another_run(self, lacking, dataset, tmp_path, unfitted, aloud):
        make_cv(dataset, tmp_path / "run").run()
        record = read_json(tmp_path / "run" / "run.json")
        del (record["identity"] if lacking == "keep" else record["identity"]["training"])[lacking]
        write_text(tmp_path / "run" / "run.json", json.dumps(record))
        make_cv(dataset, tmp_path / "run").run()
        assert f"held another run ({'keep' if lacking == 'keep' else 'training'} differs)" in aloud.text
        assert (tmp_path / "run.1" / "outputs.json").is_file()


class TestKinds:
    def test_other_groups_are_another_run(self, cohort, tmp_path, unfitted):
        table = pd.read_csv(cohort[0], dtype=str)
        table.assign(site=table["case_id"]).to_csv(tmp_path / "same.csv", index=False)
        table.assign(site=table["case_id"].str[1:].astype(int) // 2).to_csv(tmp_path / "other.csv", index=False)
        runs = [
            make_cv(MILDataset(tmp_path / f"{name}.csv", cohort[1], group_column="site"), tmp_path / "run")
            for name in ("same", "other")
        ]
        identities = [settings_identity(cv.trainer, cv.protocol, []) for cv in runs]
        assert [key for key in identities[0] if identities[0][key] != identities[1][key]] == ["groups"]


class TestGrid:
    def test_another_grid_is_another_run(self, dataset, tmp_path, unfitted, aloud):
        make_cv(dataset, tmp_path / "run").run()
        make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2").run()
        assert "held another run (grid differs)" in aloud.text


class TestJobs:
    def test_the_number_of_jobs_is_no_other_run(self, finished, dataset, monkeypatch):
        factory = partial(build_mil, "LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=2)
        assert make_cv(dataset, finished.folder, factory, jobs=3).run() == finished.results


class TestKeywords:
    def test_what_means_the_same_is_the_same_run(self, dataset, tmp_path):
        plain, other = (
            make_cv(dataset, tmp_path, **settings)
            for settings in (
                {"monitor": "slide_auc", "epochs": 3, "device": "cpu"},
                {"monitor": "auc", "epochs": np.int64(3), "device": torch.device("cpu")},
            )
        )
        assert other.protocol == plain.protocol
        assert other.training == plain.training
