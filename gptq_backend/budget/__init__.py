"""Bits and group size of each layer by a budget, spent where it lowers the model's divergence most."""

from .goal import Goal, read_goal
from .plan import BudgetPlan, GroupChoice, plan_budget

__all__ = ["BudgetPlan", "Goal", "GroupChoice", "plan_budget", "read_goal"]
