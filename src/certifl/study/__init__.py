"""What a study consists of, wherever its parts are computed: here, or on its clients' machines.

`experiments` runs all parts in one place, `deploy` each where it belongs; neither knows the other.
"""
