"""What each sample of a batch is taught and how it is routed: lessons, then weights, then the buffer takes the batch in.

Router and buffer see the whole global batch once a step, so that all ranks hold the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drift.buffer import Entry, SuccessBuffer
from drift.config.online import OnlineConfig
from drift.online.curriculum import Curriculum, Phase
from drift.online.reprompt import Attempt, fit, lessons, preferred, teacher_messages, teacher_trajectory
from drift.online.samples import Sample
from drift.routing import DifficultyRouter


class Guide:
    """Curriculum, router and buffer of one training.

    problems: how many the training has, for the buffer's epochs. teacher, buffer: whether the algorithm has one.
    """

    def __init__(self, config: OnlineConfig, tokenizer: Any, problems: int, *, teacher: bool, buffer: bool) -> None:
        self.config, self.tokenizer, self.problems, self.teacher = config, tokenizer, problems, teacher
        self.curriculum = Curriculum(config.curriculum)
        self.router = DifficultyRouter(config.router, self.curriculum.transition_end)
        self.buffer = SuccessBuffer(config.buffer) if buffer else None

    def phase(self, step: int) -> Phase:
        """The curriculum's at a step."""
        return self.curriculum.at(step)

    def route(self, samples: Sequence[Sample], step: int) -> None:
        """Sets `taught`, the router's weights and `pass_rate` of each sample and its parts, in place."""
        attempts = [Attempt(s.problem_id, s.text, s.solved_at > 0, s.feedback, s.reward, s.entropy) for s in samples]
        if self.teacher:
            self._teach(samples, attempts, step)
        self.router.transition_end = self.curriculum.transition_end
        routes = self.router.update(
            [sample.problem_id for sample in samples],
            [sample.solved_at > 0 for sample in samples],
            [sample.taught is not None for sample in samples],
            step,
        )
        columns = (routes.distill, routes.policy, routes.rebellious, routes.pass_rate)
        for sample, *values in zip(samples, *(column.tolist() for column in columns)):
            for part in sample.parts:
                part.distill, part.policy, part.rebellious, part.pass_rate = values
        if self.buffer is not None:
            chosen = [attempts[place] for place in preferred(attempts, self.config.teacher.choose)]
            self.buffer.add_batch([(a.problem_id, Entry(a.text, a.score, step, a.entropy)) for a in chosen])
        self.curriculum.observe(sum(sample.solved_at > 0 for sample in samples) / len(samples))

    def _teach(self, samples: Sequence[Sample], attempts: Sequence[Attempt], step: int) -> None:
        """The teacher's prompt of each sample that has one."""
        found = lessons(
            attempts,
            self.config.teacher,
            self.buffer,
            prompts=[sample.question for sample in samples],
            step=step,
            epoch=step * min(self.config.prompts, self.problems) // self.problems,
        )
        for sample, lesson in zip(samples, found):
            for part in sample.parts if lesson is not None else []:
                assert lesson is not None
                before = teacher_messages(part.trajectory, part.messages)
                fitted = fit(self.tokenizer, before, lesson, self.config.teacher.max_prompt_tokens)
                part.cut = fitted is not lesson
                if fitted is not None:
                    part.taught = teacher_trajectory(self.tokenizer, part.trajectory, part.messages, fitted)
