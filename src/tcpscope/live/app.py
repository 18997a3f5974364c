"""The screen itself. textual draws; a thread reads the run."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static

from tcpscope.kernel.clock import monotonic_ns
from tcpscope.live.pictures import Picture, Pictures
from tcpscope.live.view import View
from tcpscope.output import Column, screen
from tcpscope.output.screen import Cell
from tcpscope.output.table import BELOW, text_of, title_of
from tcpscope.request import Request
from tcpscope.run import Batch, Run, whole
from tcpscope.schema import Clock
from tcpscope.stop import Stop
from tcpscope.tool import Tool

_MOST_ROWS = 250
"""More are no use to who looks at them; sorting and filtering choose among all."""
_GAP = 2  # DataTable has a space on each side of a cell


class _Taken(Message):
    """A batch from the thread that reads the run. A message, because nobody waits for it: the screen may be gone."""

    def __init__(self, batch: Batch, lost: int) -> None:
        super().__init__()
        self.batch, self.lost = batch, lost


class _Over(Message):
    """The run has ended."""


class Screen(App[None]):
    """A table of the newest picture, or of an earlier one."""

    CSS = """
    #above { height: auto; padding: 0 1; background: $panel; }
    #notes { height: auto; padding: 0 1; color: $warning; display: none; }
    #filter { display: none; border: none; height: 1; padding: 0 1; }
    DataTable { height: 1fr; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "leave", "quit"),
        Binding("space", "pause", "pause"),
        Binding("less_than_sign", "sort(-1)", "sort", key_display="< >"),
        Binding("greater_than_sign", "sort(1)", show=False),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("left_square_bracket", "step(-1)", show=False),
        Binding("right_square_bracket", "step(1)", "earlier/later", key_display="[ ]"),
        Binding("enter", "details", "details", key_display="enter"),
        Binding("w", "wide", "columns"),
        Binding("escape", "live", "live", show=False),
    ]

    def __init__(self, tool: Tool, request: Request, run: Run, stop: Stop) -> None:
        super().__init__()
        self._request, self._run, self._stop = request, run, stop
        self._clock = Clock(request.time)
        self._columns = [column for column in run.columns if column.kind != "time"]
        cells = screen.cells_of(self._columns)
        hidden = {column.name for column in self._columns if column.hidden}
        usual = [cell for cell in cells if cell.names[0] not in hidden]
        self._important = screen.by_importance(usual, run.important or tool.important or tool.shown)
        self._alarming = tool.alarming
        self._name, self._noun = tool.name, run.repeats or "group"
        self.view = View(cells)
        self.pictures = Pictures()
        self.shown: Picture | None = None
        self.paused = self._all_columns = False
        self._failure: BaseException | None = None
        self._lost = self._matching = 0
        self._width = 80
        self._notes: list[str] = []
        self._shown_cells: list[Cell] = []
        self._shown_rows: list[object] = []

    def show(self) -> None:
        """Until the user, a signal, -d or the run ends it."""
        self.run()
        if self._failure:
            raise self._failure

    def compose(self) -> ComposeResult:
        yield Static(id="above", markup=False)
        yield Static(id="notes", markup=False)
        yield DataTable(cursor_type="row", cell_padding=_GAP // 2)
        yield Input(placeholder="words that a row must have, such as nginx or REMOTE=10.0", id="filter", compact=True)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self._width = self.size.width
        self._table.focus()
        self._follow()
        self._say_above()
        self.set_interval(1.0, self._say_above)

    def on_unmount(self) -> None:
        self._stop.stop()  # else the thread goes on, and its end is waited for

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one(DataTable)

    # -- the run -----------------------------------------------------------------------------------------------------

    @work(thread=True, exit_on_error=False)
    def _follow(self) -> None:
        """In a thread of its own: a look at many sockets must not hold up the keys."""
        try:
            for batch in whole(self._run.batches(self._stop, self._request.max_events)):
                if (batch.kind != "event" and not self._run.over) or self._run.notes:
                    self.post_message(_Taken(batch, 0 if self._run.over else self._run.account().lost))
        except BaseException as error:  # the reader of the run raises it
            self._failure = error
        self.post_message(_Over())

    @on(_Over)
    def over(self) -> None:
        self.exit()

    @on(_Taken)
    def take(self, taken: _Taken) -> None:
        batch, self._lost = taken.batch, max(self._lost, taken.lost)
        if self._run.notes:
            self._notes = list(dict.fromkeys([*self._notes, *self._run.notes]))[-3:]
            self._run.notes.clear()
            notes = self.query_one("#notes", Static)
            notes.update("\n".join(self._notes))
            notes.display = True
        if batch.kind == "event":
            return
        number = self.pictures.newest.number + 1 if self.pictures.newest else 0
        when = "" if self._clock.mode == "none" else str(self._clock.read(monotonic_ns()))
        self.pictures.add(Picture(number, time.monotonic(), when, batch.rows))
        if not self.paused:
            self._draw(self.pictures.newest)
        self._say_above()

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self, picture: Picture | None) -> None:
        """The picture, with the cursor on the line where it was."""
        if picture is None:
            return
        self.shown = picture
        rows = self.view.rows(picture.rows)
        self._matching, self._shown_rows = len(rows), rows[:_MOST_ROWS]
        texts = [[cell.text(row) for row in self._shown_rows] for cell in self.view.cells]
        for cell, column in zip(self.view.cells, texts, strict=True):
            if cell.kind != "list":
                cell.width = max(cell.width, *map(len, column), 0)
        room = self._width - 2  # of a scroll bar
        self._shown_cells = (
            list(self.view.cells)
            if self._all_columns
            else screen.that_fit(self._important, room, self.view.cells, gap=_GAP)
        )
        table, cursor, scroll = self._table, self._table.cursor_row, self._table.scroll_offset
        with self.batch_update():
            table.clear(columns=True)
            for cell in self._shown_cells:
                title = self._title(cell)
                width = max(cell.width, len(title))
                table.add_column(Text(title, justify="right" if cell.right else "left"), width=width)
            for row in self._shown_rows:
                table.add_row(*(self._text(cell, row) for cell in self._shown_cells))
            table.move_cursor(row=min(cursor, len(self._shown_rows) - 1), scroll=False)
            table.scroll_to(scroll.x, scroll.y, animate=False)
        self._say_above()

    def _title(self, cell: Cell) -> str:
        mark = "" if cell is not self.view.by else "v" if self.view.descending else "^"
        return f"{cell.header}{mark}"

    def _text(self, cell: Cell, row: object) -> Text:
        bad = any(name in self._alarming and self._alarming[name](getattr(row, name)) for name in cell.names)
        return Text(
            cell.text(row), style="red" if bad else "", justify="right" if cell.right else "left", overflow="ellipsis"
        )

    def _say_above(self) -> None:
        """What is shown: of which tool and moment, how much of it, whether it is live."""
        parts = [f"tcpscope {self._name}"]
        if self.shown is None:
            parts.append("waiting for the first rows")
        else:
            total = len(self.shown.rows)
            plural = "" if total == 1 else "es" if self._noun.endswith("s") else "s"
            parts += filter(None, [self.shown.time])
            some = f"{self._matching:,} of " if self._matching != total else ""
            first = f", the first {_MOST_ROWS}" if self._matching > _MOST_ROWS else ""
            parts.append(f"{some}{total:,} {self._noun}{plural}{first}")
            if self.view.words.strip():
                parts.append(f"with {self.view.words.strip()}")
            newest = self.pictures.newest
            if self.paused and newest:
                ago = time.monotonic() - self.shown.at_s
                parts.append(f"PAUSED, {ago:.0f} s ago; Esc: live")
        if self._lost:
            parts.append(f"{self._lost:,} events lost")
        self.query_one("#above", Static).update("  ".join(parts))

    def on_resize(self, event: Resize) -> None:
        self._width = event.size.width
        self._draw(self.shown)

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_leave(self) -> None:
        self._stop.stop()  # the thread ends the run, and then the screen

    def action_pause(self) -> None:
        if self.paused:
            self.action_live()
        else:
            self.paused = True
            self._say_above()

    def action_live(self) -> None:
        self.paused = False
        self._draw(self.pictures.newest)

    def action_step(self, steps: int) -> None:
        """To an earlier or a later picture. At the newest one it stays until live."""
        if self.shown is not None:
            self.paused = True
            self._draw(self.pictures.beside(self.shown, steps))

    def action_sort(self, steps: int) -> None:
        """By the next column that is shown. Before the first and behind the last: in the tool's order."""
        choices = [None, *self._shown_cells]
        at = choices.index(self.view.by) if self.view.by in choices else 0
        self.view.sort_by(choices[(at + steps) % len(choices)])
        self._draw(self.shown)

    def action_reverse(self) -> None:
        if self.view.by is not None:
            self.view.sort_by(self.view.by)
            self._draw(self.shown)

    @on(DataTable.HeaderSelected)
    def sort_by_click(self, event: DataTable.HeaderSelected) -> None:
        self.view.sort_by(self._shown_cells[event.column_index])
        self._draw(self.shown)

    def action_details(self) -> None:
        self._table.action_select_cursor()

    def action_wide(self) -> None:
        self._all_columns = not self._all_columns
        self._draw(self.shown)

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.display = True
        field.focus()

    @on(Input.Changed, "#filter")
    def filter_changed(self, event: Input.Changed) -> None:
        self.view.words = event.value
        self._draw(self.shown)

    @on(Input.Submitted, "#filter")
    def filter_given(self) -> None:
        self.query_one("#filter", Input).display = False
        self._table.focus()

    @on(DataTable.RowSelected)
    def row_selected(self, event: DataTable.RowSelected) -> None:
        if event.cursor_row < len(self._shown_rows):
            self.push_screen(_Row(self._columns, self._shown_rows[event.cursor_row]))


class _Row(ModalScreen[None]):
    """All columns of one row, with their meaning."""

    CSS = (
        "_Row { align: center middle; } VerticalScroll { width: 90%; height: 90%; padding: 1 2; background: $surface; }"
    )
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "back")]

    def __init__(self, columns: list[Column], row: object) -> None:
        super().__init__()
        self._columns, self._row = columns, row

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(self._table())
            for column in self._columns:
                if column.kind in BELOW:
                    lines = BELOW[column.kind](getattr(self._row, column.name) or [], column.unit)
                    yield Static("\n".join([title_of(column), *lines]), markup=False)

    def _table(self) -> Table:
        table = Table.grid("", "", "", padding=(0, 2, 0, 0))
        for column in self._columns:
            if column.kind not in BELOW:
                value = text_of(getattr(self._row, column.name), column.kind)
                table.add_row(*map(Text, (title_of(column), value, column.doc)))
        return table
