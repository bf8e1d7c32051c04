"""Values that property tests draw."""

from hypothesis import strategies as st

# What may stand behind the = of an override, or anywhere on a command line.
VALUES = st.one_of(
    (st.integers() | st.floats() | st.sampled_from([0.0, 1.0, 1e308, 10**30])).map(str),
    st.lists(st.integers(-3, 40), max_size=4).map(lambda values: ",".join(map(str, values))),
    st.sampled_from(["True", "none", "", "()", "[[1]]", "{1: 2}", "'a'", "0x10", "sgd", "max"]),
    st.text(max_size=20),
)
