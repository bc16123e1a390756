"""Plans: which modules of a model get which adapter method."""

from adaptc.plan.match import Match
from adaptc.plan.plan import Plan
from adaptc.plan.resolve import Assignment, Resolution
from adaptc.plan.rules import Passes, Rule

__all__ = ["Assignment", "Match", "Passes", "Plan", "Resolution", "Rule"]
