from hypothesis import settings

# A deadline per example fails on a busy machine, not on wrong maths.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
