"""From captured graphs to code: capture backend, lowering, costs."""
