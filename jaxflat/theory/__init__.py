"""The paper's three results as checks that run: python -m jaxflat.theory bartlett|drift|dyck."""
