"""A Streamlit page with a document of 60 MB, which comes in one message; run by a Python that has Streamlit."""

import streamlit as st  # type: ignore[import-not-found]

st.json({"text": "x" * 60_000_000}, expanded=False)
st.session_state.setdefault("count", 0)
if st.button("Count"):
    st.session_state.count += 1
st.text(f"{st.session_state.count} after the document")
