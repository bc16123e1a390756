"""The ops of the dialect: each its mathematics (body, fake, gradient, cost, sample)."""
