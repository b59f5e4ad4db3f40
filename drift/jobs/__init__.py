"""The jobs that the commands run: a whole run, its stages, a study, an evaluation, the doctor."""
