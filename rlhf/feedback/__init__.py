"""From judgements to rankings: constitutions, judge texts, verdicts, rankings and their agreement."""
