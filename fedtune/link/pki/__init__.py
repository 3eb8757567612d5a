"""Identities of the link: certificates, signing keys, enrollment and the signed roster."""
