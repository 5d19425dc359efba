"""The kind of command line that all commands here have."""

import argparse
import difflib
import re

from util.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse that takes - and _ alike in flags, and raises InputError with one line."""

    def parse_known_args(self, args=None, namespace=None):
        known = {re.sub("_", "-", flag): flag for flag in self._option_string_actions if flag.startswith("--")}
        fixed = []
        for word in args or ():
            flag, equals, value = word.partition("=")
            fixed.append(known.get(re.sub("_", "-", flag), flag) + equals + value if word.startswith("--") else word)
        self.known_flags = sorted(known.values())
        return super().parse_known_args(fixed, namespace)

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], self.known_flags, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
        raise InputError(message + (hint if unknown else ""))
