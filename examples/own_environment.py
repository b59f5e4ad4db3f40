"""An environment of your own, by import path: rollout.environment=own_environment:Guess.

    python examples/own_environment.py

The class is called with (task, settings), `settings` being the rollout's or the evaluation's. `reset` opens a
conversation; `step` gets all live episodes of a batch and answers each of them. It runs in the training process, with all
its rights, and what it says is never trained.
"""

import re
import sys
import tempfile
from pathlib import Path

from drift.rollouts.environments import Step


class Guess:
    """A number to guess: the environment says higher or lower, and pays more the nearer a guess is."""

    def __init__(self, task, settings):
        self.task, self.settings = task, settings

    def reset(self, problem):
        """The first messages."""
        return [{"role": "user", "content": "Guess my number, from 0 to 9."}]

    def step(self, episodes):
        """One answer for each episode."""
        return [self.answer(episode) for episode in episodes]

    def answer(self, episode):
        """Right ends the episode with reward 1; a guess that is off by d is worth (9 - d)/18."""
        digit, secret = re.search(r"\d", episode.reply), int(episode.problem.answer) % 10
        if digit is None:
            return Step([{"role": "user", "content": "A digit, please."}], answer=None)
        off = int(digit[0]) - secret
        if off == 0:
            return Step(reward=1.0, done=True, answer=digit[0])
        said = "Lower." if off > 0 else "Higher."
        return Step([{"role": "user", "content": said}], reward=(9 - abs(off)) / 18, answer=digit[0])


def main(folder: Path) -> int:
    """Runs the embedded model, untrained, to show the settings; a real run names model.path."""
    from drift.cli import main as drift

    config = "name: own-environment\narms: [drift]\nwarm_start: {enabled: false}\n"
    config += "task: {name: basic_arithmetic, train_problems: 16, eval_problems: 16}\n"
    config += "rollout: {n: 4, turns: 3, max_new_tokens: 4, environment: 'own_environment:Guess'}\n"
    config += "eval: {turns: 3, max_new_tokens: 4}\n"
    (folder / "own.yaml").write_text(config)
    return drift(["run", str(folder / "own.yaml"), f"output_dir={folder / 'runs'}", *sys.argv[1:]])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(Path(made)))
