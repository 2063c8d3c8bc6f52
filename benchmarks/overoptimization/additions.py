"""What the lab adds to the preparation of a world's models."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt

PREFIX = "lab."
POLICY = f"{PREFIX}policy"
HELP = "name the `policy` folder of models prepared for this task"


class Additions(BaseModel):
    """What the lab adds to a preparation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = ""
    """Directory of a prepared policy to copy instead of training one, for another reward model to meet."""
    reward_from_policy: bool = False
    """Whether the reward model's trunk starts as a copy of the fine-tuned policy's, in the same shape."""
    reward_auxiliary_steps: NonNegativeInt = 0
    """Optimizer steps in which the reward model's trunk learns, before any pair, to count the courtesies,
    intensifiers, words, off-topic facts and repeats of a response."""
    reward_auxiliary_truth: bool = False
    """Whether it counts correct, wrong and corrected facts as well."""
