"""Configuration: every file of conf/ composes, every rule speaks up, and all mistakes are told at once."""

from __future__ import annotations

import ast
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import r2m_ray
from r2m_ray.compose import groups, load_config, load_saved
from r2m_ray.config import Advantage, Config, Dtype, FeedbackRefresh, KLPlace, Ratio, TaskName, WandbMode
from r2m_ray.config_checks import RULES, validate
from r2m_ray.config_schema import range_of, schema
from r2m_ray.errors import InputError
from r2m_ray.problems import Problem
from r2m_ray.sweep import NAME_LENGTH, job_name, sweep

PACKAGE = Path(r2m_ray.__file__).parent
FILES = ("task.train_file=org/pairs", "task.eval_file=org/pairs")
LARGE_BATCH = ("algo.prompts_per_step=64", "algo.minibatch_prompts=32")
EXPERIMENTS = groups()["experiment"]
ARMS = groups()["reward"]


@cache
def experiment(name: str, *overrides: str) -> Config:
    files = () if name == "demo" else FILES
    return load_config([f"experiment={name}", *files, *overrides])


def complaint(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(overrides)
    return str(caught.value)


def lines_about(text: str, path: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(f"{path}:")]


# conf/


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, options in groups().items() for option in options]
)
def test_every_file_composes_without_an_error(group: str, option: str) -> None:
    needs_files = option not in ("demo",) and (group == "experiment" or option == "preferences")
    batch = LARGE_BATCH if group == "cluster" else ()
    config = load_config([f"{group}={option}", *batch, *(FILES if needs_files else ())])
    assert [problem for problem in validate(config) if not problem.warning] == []


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(("dialogue", "tldr"))])
def test_experiments_of_the_paper_fit_both_gpu_clusters(name: str) -> None:
    for cluster in ("gpu_node", "gpu_cluster"):
        config = experiment(name, f"cluster={cluster}")
        assert config.cluster.gpus_per_learner == 1
        assert validate(config) == []


ARM_NUMBERS = {
    # arm: (Ω < 1, update steps, α, noise); None where nothing reads the number
    "vanilla": (False, 0, None, 0.0),
    "r2m": (True, 1, 0.3, 0.0),
    "r2m_frozen": (True, 0, None, 0.0),
    "r2m_noise": (True, 1, 0.3, 1.0),
    "r2m_no_bt": (True, 1, 1.0, 0.0),
    "r2m_no_gre": (True, 1, 0.0, 0.0),
    "rm_head": (False, 1, 0.3, 0.0),
}


@pytest.mark.parametrize(("name", "arm"), [*itertools.product(EXPERIMENTS, ARMS)])
def test_arms_are_numbers_and_keep_them_in_every_experiment(name: str, arm: str) -> None:
    feedback, updates, alpha, noise = ARM_NUMBERS[arm]
    config = experiment(name, f"reward={arm}")
    assert config.uses_feedback is feedback
    assert config.reward.omega_floor == (experiment(name).reward.omega_floor if feedback else 1.0)
    assert config.reward.update_steps == updates
    assert alpha is None or config.reward.entropy_weight == alpha
    assert config.feedback.noise == noise


def test_an_arm_changes_nothing_but_its_numbers() -> None:
    numbers = {"reward.omega_floor", "reward.update_steps", "reward.entropy_weight", "feedback.noise"}
    base = experiment("demo")
    for arm in ARMS:
        assert set(differences(base, experiment("demo", f"reward={arm}"))) <= numbers


def test_algorithms_differ_by_advantage_ratio_and_place_of_the_kl() -> None:
    chosen = {name: load_config([f"algo={name}"]).algo for name in groups()["algo"]}
    assert {name: algo.advantage for name, algo in chosen.items()} == {a.value: a for a in Advantage}
    ratios = {name for name, algo in chosen.items() if algo.ratio is Ratio.sequence}
    assert ratios == {"rloo", "remax"}
    in_reward = {name for name, algo in chosen.items() if algo.kl_place is KLPlace.reward}
    assert in_reward == {"reinforce_pp", "remax"}


PAPER = {
    "dialogue_qwen2_5_3b": {"policy.learning_rate": 6e-6, "reward.omega_floor": 0.7},
    "dialogue_llama3_8b": {"policy.learning_rate": 1e-6, "reward.omega_floor": 0.6},
}
DIALOGUE = {
    "algo.steps": 100, "algo.prompts_per_step": 64, "algo.responses_per_prompt": 8, "algo.temperature": 0.7,
    "algo.epochs": 2, "algo.clip_low": 0.2, "algo.clip_high": 0.2, "algo.kl_weight": 0.04,
    "task.max_new_tokens": 512, "reward.attention_width": 2048, "reward.learning_rate": 1e-6,
    "reward.entropy_weight": 0.3, "reward.init_std": 0.02, "model.dtype": Dtype.bfloat16,
    "model.reward": "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
}  # fmt: skip
TLDR = {
    "algo.prompts_per_step": 2048, "algo.responses_per_prompt": 4, "algo.steps": 122,
    "task.max_new_tokens": 50, "policy.learning_rate": 3e-6, "reward.learning_rate": 5e-7,
    "reward.omega_floor": 0.6,
}  # fmt: skip
DEMO = {
    "task.name": TaskName.note2answer, "algo.steps": 24, "algo.prompts_per_step": 16,
    "algo.responses_per_prompt": 8, "algo.epochs": 2, "algo.minibatch_prompts": 8, "algo.temperature": 1.0,
    "reward.omega_floor": 0.6, "reward.entropy_weight": 0.3, "reward.learning_rate": 1e-4,
    "reward.init_std": 0.15, "reward.attention_width": 64, "policy.learning_rate": 3e-4,
    "evaluate.every": 6, "evaluate.prompts": 64, "logging.wandb": WandbMode.offline,
    "rollout.engine_args": {
        "enforce_eager": True, "max_num_seqs": 128, "block_size": 32, "num_gpu_blocks_override": 2048,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, DIALOGUE | own) for name, own in PAPER.items()), ("tldr_pythia_2_8b", TLDR), ("demo", DEMO)],
)
def test_experiments_hold_their_settings(name: str, settings: dict[str, object]) -> None:
    values = flat(experiment(name))
    assert {path: values[path] for path in settings} == settings


def test_one_million_trajectories_of_the_summarization_experiment() -> None:
    algo = experiment("tldr_pythia_2_8b").algo
    trajectories = algo.steps * algo.prompts_per_step * algo.responses_per_prompt
    assert trajectories == pytest.approx(1e6, rel=1e-3)


def test_the_command_line_has_the_last_word() -> None:
    config = load_config(["experiment=demo", "reward=vanilla", "reward.omega_floor=0.5", "algo=grpo"])
    assert (config.reward.omega_floor, config.reward.update_steps) == (0.5, 0)
    assert (config.algo.advantage, config.algo.steps) == (Advantage.grpo, 24)


def test_options_for_the_engines_pass_through() -> None:
    config = load_config(
        [
            "rollout.engine_args.block_size=16",
            "~rollout.engine_args.num_gpu_blocks_override",
            "+rollout.engine_args.enable_prefix_caching=false",
            "~rollout.engine_args.enforce_eager",
            "policy.deepspeed={zero_optimization: {stage: 1}}",
        ]
    )
    assert config.rollout.engine_args == {
        "max_num_seqs": 128,
        "block_size": 16,
        "enable_prefix_caching": False,
    }
    assert config.policy.deepspeed == {"zero_optimization": {"stage": 1}}


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(["experiment=demo"])
    assert list(tmp_path.iterdir()) == []


def test_options_of_ones_own_are_found_and_checked(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    header = "# @package _global_\ndefaults: [override /algo: grpo]\n"
    search = f"hydra.searchpath=[file://{tmp_path}]"

    file.write_text(f"{header}algo: {{steps: 7}}")
    algo = load_config([search, "experiment=mine"]).algo
    assert (algo.steps, algo.advantage) == (7, Advantage.grpo)

    file.write_text(f"{header}algo: {{stepz: 7, epochs: two}}")
    text = complaint(search, "experiment=mine", "reward=vanila", "hydra.nothing=1")
    assert text.startswith("4 problems")
    assert "Could not override 'hydra.nothing'" in text
    assert "Did you mean vanilla?" in text
    assert "Did you mean algo.steps?" in text
    assert "algo.epochs: two is not a whole number ≥ 1" in text

    file.write_text("a: [")
    assert "experiment=mine: while parsing" in complaint(search, "experiment=mine")


def test_a_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = experiment("preferences_tiny", "run.seed=7", "algo=remax")
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert load_saved(file, []) == config
    assert differences(config, load_saved(file, ["evaluate.prompts=8"])) == ["evaluate.prompts"]
    for overrides, words in (
        (["reward=vanilla"], "chooses from a group"),
        (["evaluate.promts=8"], "Did you mean evaluate.prompts?"),
        (["evaluate.prompts=8,9"], "several values"),
    ):
        with pytest.raises(InputError, match=words):
            load_saved(file, overrides)
    file.write_text("a: [")
    with pytest.raises(InputError, match="not a configuration"):
        load_saved(file, [])


# Mistakes


def test_all_mistakes_are_told_at_once() -> None:
    text = complaint(
        "experiment=dem",
        "reward=vanila",
        "algo.stepz=3",
        "omega_floor=0.5",
        "algo.temperature=nan",
        "algo.responses_per_prompt=1",
        "policy.learning_rate=-1",
        "task.overlong=eror",
        "run.resume=maybe",
        "run.name=../up",
        "algo.epochs=1,2",
        "==",
        "algo.minibatch_prompts=6",
        "reward.max_grad_norm=inf",
    )
    assert text.startswith("14 problems")
    for words in (
        "experiment=dem: no such option; there are demo, ",
        "Did you mean demo?",
        "reward=vanila: no such option",
        "Did you mean vanilla?",
        "algo.stepz: no such field",
        "Did you mean algo.steps?",
        "Did you mean reward.omega_floor?",
        "algo.temperature: nan is not a number > 0",
        "algo.responses_per_prompt: 1 is not a whole number ≥ 2",
        "policy.learning_rate: -1.0 is not a number ≥ 0",
        "task.overlong: eror is not one of error, drop. Did you mean error?",
        "run.resume: maybe is not true or false",
        "algo.epochs=1,2: is several values",
        "algo.minibatch_prompts: 6 is not a multiple of 4",
        "use 4 or 8",
        "reward.max_grad_norm: inf is not a number > 0",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algo.steps=2.5", "algo.steps: 2.5 is not a whole number ≥ 1"),
        ("algo.steps=many", "algo.steps: many is not a whole number ≥ 1"),
        ("algo.steps=null", "algo.steps: null is not a whole number ≥ 1"),
        ("algo.clip_low=1.0", "algo.clip_low: 1.0 is not a number in (0, 1)"),
        ("reward.omega_floor=1.01", "reward.omega_floor: 1.01 is not a number in [0, 1]"),
        ("reward.entropy_weight=-0.1", "reward.entropy_weight: -0.1 is not a number in [0, 1]"),
        ("algo.temperature=0", "algo.temperature: 0.0 is not a number > 0"),
        ("algo.advantage=rlo", "Did you mean rloo?"),
        ("model.dtype=float16", "one of float32, bfloat16. Did you mean bfloat16?"),
        ("algo=7", "algo: is a section, not a value"),
        ("rewards.omega_floor=1", "Did you mean reward?"),
        ("learning_rate=1", "Did you mean policy.learning_rate or reward.learning_rate?"),
        ("algo.learning_rate=1", "Did you mean policy.learning_rate or reward.learning_rate?"),
        ("rollout.engine_args=fast", "rollout.engine_args: fast is not a mapping"),
        ("rollout.engine_args.x=nan", "rollout.engine_args.x: nan is not a finite number"),
        ("policy.deepspeed={a: [1.0, inf]}", "policy.deepspeed.a[1]: inf is not a finite number"),
        ("run.name=???", "run.name: needs a value; give run.name=…"),
        ("run.root=${task.nothing}", "task.nothing"),
        ("~algo.nothing", "there is nothing to delete"),
        ("run.name=a b", "run.name: 'a b' is not 1 to 100 of"),
    ],
)
def test_a_mistake_names_field_value_and_remedy(override: str, words: str) -> None:
    assert words in complaint(override)


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", "a\\b", ".hidden", "..", "", "a\nb", "ü", "x" * 101]
)
def test_run_names_that_could_leave_the_root_are_refused(name: str) -> None:
    config = Config()
    config.run.name = name
    assert [problem.path for problem in validate(config)] == ["run.name"]


@pytest.mark.parametrize("name", ["run", "a.b-c_D9", "x" * 100])
def test_run_names_of_the_allowed_characters_pass(name: str) -> None:
    config = Config()
    config.run.name = name
    assert validate(config) == []


def test_messages_spell_out_control_characters() -> None:
    text = complaint("model.dtype='\x1b[2J\u202e'")
    assert "\x1b" not in text
    assert "\\x1b" in text
    assert "\\u202e" in text


RULE_CASES: list[tuple[Sequence[str], str, str, bool]] = [
    (["algo.prompts_per_step=18"], "algo.prompts_per_step", "use 16 or 20", False),
    (["algo.minibatch_prompts=6"], "algo.minibatch_prompts", "use 4 or 8", False),
    (["algo.minibatch_prompts=12", "policy.ranks=2"], "algo.minibatch_prompts", "use 8 or 16", False),
    (["algo.minibatch_prompts=32"], "algo.minibatch_prompts", "at most 16", False),
    (["algo.prompts_per_step=20"], "algo.prompts_per_step", "use 16 or 24", False),
    (["rollout.replicas=5"], "rollout.replicas", "at most 4", False),
    (["reward.replicas=5"], "reward.replicas", "at most 4", False),
    (["reference.replicas=5"], "reference.replicas", "at most 4", False),
    (["algo.responses_per_prompt=2"], "reward.entropy_weight", "has no effect", True),
    (
        ["algo.responses_per_prompt=2", "reward=r2m_no_bt"],
        "reward.entropy_weight",
        "nothing is learned",
        False,
    ),
    (["algo.epochs=1", "algo.minibatch_prompts=16"], "feedback.refresh", "not refreshed", True),
    (["sync.backend=nccl"], "sync.backend", "use object_store", False),
    (["sync.backend=ipc", "cluster.gpus_per_learner=1"], "sync.backend", "gpus_per_rollout=0", False),
    (["cluster.gpus_per_rollout=1.5"], "cluster.gpus_per_rollout", "use 1 or 2", False),
    (["model.dtype=bfloat16"], "model.dtype", "use float32", True),
    (["model.reward_dtype=bfloat16"], "model.reward_dtype", "use float32", True),
    (["cluster.cpus_per_actor=0.6"], "cluster.cpus_per_actor", "use 0.5", False),
    (["cluster.object_store_gb=0.01"], "cluster.object_store_gb", "use 0.08 or more", False),
    (["cluster.placement=spread"], "cluster.placement", "Did you mean SPREAD?", False),
    (["task=preferences", FILES[1]], "task.train_file", "give task.train_file=…", False),
    (["task=preferences", FILES[0]], "task.eval_file", "give task.eval_file=…", False),
    ([FILES[0]], "task.train_file", "task=preferences alone", False),
    (["prepare.policy_width=90", "prepare.policy_heads=4"], "prepare.policy_width", "use 88 or 96", False),
    (["run.root=' '"], "run.root", "is empty", False),
    (
        ["rollout.engine_args.trust_remote_code=true"],
        "rollout.engine_args.trust_remote_code",
        "never run",
        False,
    ),
    (["run.name=.x"], "run.name", "no dot first", False),
]


@pytest.mark.parametrize(("overrides", "path", "words", "warning"), RULE_CASES)
def test_rules_between_fields(overrides: Sequence[str], path: str, words: str, warning: bool) -> None:
    if warning:
        found = [str(problem) for problem in validate(load_config(overrides)) if problem.warning]
    else:
        found = lines_about(complaint(*overrides), path)
    assert any(line.startswith(f"{path}:") and words in line for line in found), found


def test_every_rule_has_a_case() -> None:
    broken = {path for _, path, _, _ in RULE_CASES}
    # The code of a model is refused below the field that the rule reads.
    assert all(any(path.startswith(read) for path in broken for read in reads) for reads, _ in RULES)
    assert set(itertools.chain(*(reads for reads, _ in RULES))) <= set(schema())


def test_groups_of_two_learn_by_bradley_terry_alone_without_complaint() -> None:
    for arm in ("r2m_no_gre", "vanilla", "r2m_frozen"):
        assert validate(load_config(["algo.responses_per_prompt=2", f"reward={arm}"])) == []


def test_refresh_is_silent_where_h_moves_or_nobody_learns_from_it() -> None:
    once = ["algo.epochs=1", "algo.minibatch_prompts=16"]
    for change in ("reward=vanilla", "reward=r2m_frozen", "feedback.refresh=exact", "feedback.refresh=none"):
        assert validate(load_config([*once, change])) == []
    assert load_config([*once, "feedback.refresh=exact"]).feedback.refresh is FeedbackRefresh.exact


def test_a_rule_is_silent_about_a_field_known_to_be_wrong() -> None:
    text = complaint("algo.prompts_per_step=0", "algo.prompts_per_shard=three")
    assert text.startswith("2 problems")


# The schema


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_no_number_may_be_negative_or_not_finite(value: float) -> None:
    for path in (path for path, kind in schema().items() if range_of(kind)):
        config = Config()
        section, name = path.split(".")
        setattr(getattr(config, section), name, value)
        assert path in {problem.path for problem in validate(config) if not problem.warning}


def test_every_number_has_a_range_that_holds_its_default() -> None:
    defaults = flat(Config())
    for path, kind in schema().items():
        bounds = range_of(kind)
        is_number = isinstance(defaults[path], int | float) and not isinstance(defaults[path], bool)
        assert (bounds is not None) == is_number, path
        assert bounds is None or defaults[path] in bounds, path
        assert bounds is None or get_args(kind)[0] is type(defaults[path]), path


def test_the_defaults_alone_are_valid() -> None:
    assert validate(Config()) == []


def test_every_field_has_a_sentence() -> None:
    seen = 0
    for file in ("config.py", "config_run.py"):
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if not isinstance(node, ast.ClassDef) or node.name == "Config":
                continue
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"
                    assert ast.literal_eval(following.value).endswith(".")
                    seen += 1
    assert seen == len(schema())


def test_reading_a_configuration_imports_no_engine() -> None:
    code = (
        "import sys\n"
        "import r2m_ray.__main__, r2m_ray.preflight\n"
        "from r2m_ray.compose import load_config\n"
        "load_config(['experiment=demo'])\n"
        "engines = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'trl', 'wandb'}\n"
        "print(sorted(engines & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


# Sweeps


def test_a_sweep_is_the_cross_product_with_a_name_for_each() -> None:
    jobs = sweep(["experiment=demo", "reward=vanilla,r2m", "run.seed=0,1", "algo.steps=10"])
    assert [job.config.run.name for job in jobs] == [
        "demo-reward-vanilla-run.seed-0",
        "demo-reward-vanilla-run.seed-1",
        "demo-reward-r2m-run.seed-0",
        "demo-reward-r2m-run.seed-1",
    ]
    assert [(job.config.reward.update_steps, job.config.run.seed) for job in jobs] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    for job in jobs:
        assert load_config(job.overrides) == job.config


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("run.name=a,b", ["a", "b"]),
        ("reward=glob(r2m_no_*)", ["run-reward-r2m_no_bt", "run-reward-r2m_no_gre"]),
        ("run.seed=range(3,5)", ["run-run.seed-3", "run-run.seed-4"]),
        (
            "policy.learning_rate=1e-4,3e-4",
            ["run-policy.learning_rate-0.0001", "run-policy.learning_rate-0.0003"],
        ),
        ("model.attention='a b','a/b'", ["run-model.attention-a_b", "run-model.attention-a_b-1"]),
        ("run.seed=1", ["run"]),
    ],
)
def test_sweep_grammar_and_names(override: str, names: list[str]) -> None:
    assert [job.config.run.name for job in sweep([override])] == names


def test_a_sweep_tells_the_mistakes_of_all_jobs_once() -> None:
    with pytest.raises(InputError) as caught:
        sweep(["reward=vanila,r2n,r2m", "algo.stepz=3"])
    text = str(caught.value)
    assert text.count("algo.stepz") == 1
    assert "Did you mean vanilla?" in text
    assert "reward=r2n" in text
    with pytest.raises(InputError, match="use choice or range"):
        sweep(["algo.temperature=interval(0,1)"])
    with pytest.raises(InputError, match="not of the form"):
        sweep(["==", "run.seed=0,1"])


@settings(deadline=None)
@given(base=st.from_regex(r"[a-z]{1,60}", fullmatch=True), suffix=st.text(max_size=150))
def test_job_names_are_always_legal(base: str, suffix: str) -> None:
    config = Config()
    config.run.name = job_name(base, [suffix])
    assert len(config.run.name) <= NAME_LENGTH
    assert validate(config) == []


def test_long_job_names_stay_apart() -> None:
    names = {job_name("run", [f"{'x' * 120}{i}"]) for i in range(50)}
    assert len(names) == 50


def test_a_problem_is_one_line() -> None:
    assert str(Problem("a.b", "one\ntwo")) == "a.b: one\\x0atwo"


def flat(config: Config) -> dict[str, Any]:
    values = asdict(config)
    return {f"{section}.{name}": value for section in values for name, value in values[section].items()}


def differences(one: Config, other: Config) -> list[str]:
    first, second = flat(one), flat(other)
    return [path for path in first if first[path] != second[path]]


def test_choices_are_named_as_they_are_valued() -> None:
    kinds = {kind for kind in schema().values() if isinstance(kind, type) and issubclass(kind, Enum)}
    assert len(kinds) == 16
    # OmegaConf reads a choice by its name, users by its value.
    assert all(member.name == member.value for kind in kinds for member in kind)
