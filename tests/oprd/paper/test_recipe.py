"""The recipe of ``oprd-paper``: every row gives a configuration that could run."""

import pytest

from oprd.config.io import from_values, to_yaml
from oprd.config.train import check_values
from oprd.errors import ConfigError
from oprd.paper import command
from oprd.paper.command import PaperConfig, level_jobs, run_paper, tuning_jobs
from oprd.paper.recipe import Places, check_rows, recipe
from oprd.training.stages import merged, stage_values

R = recipe()


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "models", tmp_path / "prompts", tmp_path / "bridges")


def configuration(row, places, tmp_path, seed=0):
    shared = R.shared(places, R.levels["default"], seed, tmp_path / "run")
    return from_values(merged(shared, R.options(row, places)))


@pytest.mark.parametrize("row", [i for i, row in R.rows.items() if not row.stages])
def test_a_row_is_a_configuration_without_problems(row, places, tmp_path):
    cfg = configuration(row, places, tmp_path)
    check_values(cfg)
    assert cfg.teacher.path == str(places.models / R.teacher(row))
    assert cfg.optim.lr == R.rate(row)
    assert str(places.prompts) in cfg.data.train.path
    assert not any(f"{{{name}}}" in to_yaml(cfg) for name in vars(places))


def test_the_stages_of_a_row_follow_each_other(places, tmp_path):
    (row,) = [row for row in R.rows.values() if row.stages]
    shared = R.shared(places, R.levels["default"], 0, tmp_path / "run")
    stages = stage_values(shared, {s: R.options(s, places) for s in row.stages})
    first, second = (from_values(values) for values in stages.values())
    assert "oprd" in first.objectives
    assert first.bridge.path is not None
    assert "opd_top1" in second.objectives
    assert second.student.path == str(tmp_path / "run" / row.stages[0] / "student")
    check_values(second)


def test_rows_differ_in_what_their_names_say(places, tmp_path):
    def get(row):
        return configuration(row, places, tmp_path)

    assert get("oprd_last").distill.layers == "last"
    assert get("oprd_first_k").distill.positions == "first_k"
    assert get("mu_10").objectives == {"opd_top1": 1.0, "oprd": 10.0}
    assert get("oprd_x4").rollout.prompts_per_step == 4 * get("oprd").rollout.prompts_per_step
    assert get("bridge_r1").bridge.rank == 1
    assert get("tok_student_ids").teacher.reads == "student_ids"
    assert get("tok_bridge").teacher.reads == "text"


def test_rows_without_a_rate_share_that_of_a_row_that_is_tuned():
    for name, row in R.rows.items():
        assert (row.rate is not None) + (row.rate_of is not None) + bool(row.stages) == 1, name
        assert R.rate(name) in R.rates, name


def test_a_fit_is_of_the_teacher_that_the_rows_train_with(places, tmp_path):
    for name, bridge in R.bridges.items():
        cfg = R.fit_config(name, places, tmp_path / "b.safetensors")
        assert cfg.teacher.path == str(places.models / bridge.teacher)
        assert cfg.teacher.reads == bridge.reads
        assert cfg.rank == bridge.rank
        ranks = [row.rank for row in R.rows.values() if row.bridge == name]
        assert max(ranks) <= bridge.rank


def test_what_a_job_needs_comes_before_it(places, tmp_path):
    cfg = PaperConfig(output_dir=str(tmp_path))
    for make_jobs in (level_jobs, tuning_jobs):
        jobs = [*make_jobs(cfg.level(), tmp_path, places)]
        titles = [job.title for job in jobs]
        assert len(set(titles)) == len(titles)
        assert len({job.directory for job in jobs}) == len(jobs)
        for i, job in enumerate(jobs):
            assert set(job.needs) <= set(titles[:i]), job.title


def test_quick_needs_no_model_that_does_not_come_with_the_package(places, tmp_path):
    cfg = PaperConfig(output_dir=str(tmp_path), quick=True)
    kinds = {job.kind for job in level_jobs(cfg.level(), tmp_path, places)}
    assert kinds == {"model", "row"}


def test_all_seeds_of_a_row_come_after_the_first_seed_of_every_row(places, tmp_path):
    cfg = PaperConfig(output_dir=str(tmp_path))
    seeds = [j.seed for j in level_jobs(cfg.level(), tmp_path, places) if j.kind == "row"]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ["oprd", "opdr"]}, "opdr unknown; there are opd_top1"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"seeds": [-1]}, "seeds must lie in 0"),
        ({"rows": []}, "rows must be distinct values, at least one"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"tune": True, "rows": ["oprd_last"]}, "oprd_last share another row's learning rate"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        PaperConfig(output_dir=str(tmp_path / "out"), **options).check()


@pytest.mark.parametrize("content", ["{}", "{", '{"base": 1, "rows": []}'])
def test_a_directory_of_another_recipe_is_refused(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ConfigError, match="another version of the recipe"):
        run_paper(PaperConfig(str(tmp_path), quick=True))


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        run_paper(PaperConfig(str(tmp_path), quick=True))


def test_a_second_command_in_a_directory_is_refused(tmp_path, places):
    command._prepare(tmp_path, places)
    with command._alone(tmp_path), pytest.raises(ConfigError, match="another oprd-paper is run"):
        run_paper(PaperConfig(str(tmp_path), quick=True))


def test_known_rows_are_accepted():
    check_rows(R.rows)
