"""What a page of HTML holds and would fetch."""

from html.parser import HTMLParser


class References(HTMLParser):
    """Everything that a page would fetch, also inside its frames."""

    FETCHES = {"src", "srcset", "data", "poster", "action", "background"}  # noqa: RUF012

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.fetched += [value for name, value in attributes if name in self.FETCHES]
        if tag == "link":
            self.fetched.append(values["href"])
        if tag == "section":
            self.sections.append(values["id"])
        if "srcdoc" in values:
            self.fetched += References(values["srcdoc"]).fetched
