"""Ray roles: generation, judge, scorer, learner, critic, reference and recorder, each a plain class."""
