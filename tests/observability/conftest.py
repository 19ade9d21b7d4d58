"""What lies here exists to be found blind: it is audited by tests, not collected as tests."""

collect_ignore = ["legacy_fp8.yaml"]
