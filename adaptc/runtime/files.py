from typing import Any
from adaptc.plan import Plan
def is_adapter_directory(p): return False
def plan_of(p): return Plan.coerce(p)
