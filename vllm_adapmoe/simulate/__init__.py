"""Records routing traces of live traffic and replays them against cache policies."""
