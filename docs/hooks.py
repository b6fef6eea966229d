"""Hooks of MkDocs, for the site."""

import re


def on_page_content(html: str, **_) -> str:
    """Show the types of arguments, which docstrings state as Diffusers' do, without their Markdown."""
    return re.sub(
        r"<td>\s*<code>(.*?)</code>",
        lambda match: f"<td><code>{match[1].replace('`', '').replace('*optional*', 'optional')}</code>",
        html,
        flags=re.DOTALL,
    )
