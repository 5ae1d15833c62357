// SPDX-License-Identifier: GPL-2.0-only

//! What is found in a range, as text and as JSON.

use crate::image::Image;
use anyhow::{Context, Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pmem_core::kmem::bitmap::Bitmap;
use pmem_core::kmem::layout::Layout;
use pmem_core::kmem::scan::{self, Kind, Scan};
use pmem_core::kmem::superblock::{
    self, Fault, Found, Place, ProbeError, Repair, State, Superblock,
};
use pmem_core::kmem::PAGE_SIZE;
use pmem_core::medium::{Medium, Unreadable};
use pmem_core::size::Size;
use serde::{Serialize, Serializer};
use std::fmt::Write;
use std::sync::atomic::AtomicU64;

/// An index of this many bytes takes long enough for a bar.
const LONG: u64 = 64 << 20;

/// How often the bar moves, in bytes.
const STEP: u64 = 1 << 20;

/// Whether a range is in order: the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    /// It is.
    InOrder = 0,
    /// It has faults.
    Faults = 4,
    /// It cannot be told.
    Error = 8,
}

/// What is found in a range.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) status: Status,
    #[serde(skip)]
    pub(crate) status_of_superblock: Status,
    /// Why it cannot be told whether it is in order, or why there is no superblock that counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    range: Option<Range>,
    /// What counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    superblock: Option<Fields>,
    #[serde(skip_serializing_if = "Option::is_none")]
    copies: Option<Copies>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<Index>,
}

/// Where the range is, in bytes.
#[derive(Debug, Serialize)]
struct Range {
    start: u64,
    size: u64,
}

/// The fields of a superblock.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Fields {
    format: String,
    uuid: String,
    state: String,
    generation: u64,
    pages: u64,
    index_pages: u64,
    blocks: u64,
    spare_pages: u64,
}

impl Fields {
    fn new(superblock: &Superblock) -> Self {
        let layout = &superblock.layout;
        Self {
            format: superblock.format().to_string(),
            uuid: superblock.uuid.to_string(),
            state: superblock.state.to_string(),
            generation: superblock.generation,
            pages: layout.pages(),
            index_pages: layout.index_pages(),
            blocks: layout.blocks(),
            spare_pages: layout.spare_pages(),
        }
    }
}

/// The two superblocks.
#[derive(Debug, Serialize)]
struct Copies {
    primary: Copy,
    second: Copy,
}

/// A superblock.
#[derive(Debug, Serialize)]
struct Copy {
    status: CopyStatus,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    fields: Option<Fields>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum CopyStatus {
    /// It is valid, and counts.
    Valid,
    /// A power loss left it as it is. The driver repairs it.
    Interrupted,
    /// Something else happened to it. The driver repairs it, if the other one is valid.
    Damaged,
    /// There is none.
    Missing,
}

/// What the index says.
#[derive(Debug, Serialize)]
struct Index {
    /// The pages that have data.
    mapped: u64,
    /// The entries and sectors that are wrong.
    faults: u64,
    /// The sectors that cannot be read.
    unreadable: u64,
    /// The first of them.
    first: Vec<EntryFault>,
}

/// An entry that is wrong.
#[derive(Debug, Serialize)]
struct EntryFault {
    block: u64,
    page: u64,
    #[serde(serialize_with = "kind")]
    kind: Kind,
    message: String,
}

fn kind<S: Serializer>(kind: &Kind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match kind {
        Kind::NotData => "not_data",
        Kind::Twice => "twice",
        Kind::NoBlock => "no_block",
        Kind::Unreadable => "unreadable",
    })
}

impl Index {
    fn new(scan: &Scan) -> Self {
        let first = scan.first.iter().flatten();
        Self {
            mapped: scan.mapped,
            faults: scan.faults,
            unreadable: scan.unreadable,
            first: first
                .map(|fault| EntryFault {
                    block: fault.block.0,
                    page: fault.page,
                    kind: fault.kind,
                    message: fault.to_string(),
                })
                .collect(),
        }
    }
}

/// A medium that moves a bar while it is read.
struct Watched<'a> {
    image: &'a Image,
    bar: ProgressBar,
}

impl Medium for Watched<'_> {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Unreadable> {
        if offset % STEP == 0 {
            self.bar.set_position(offset);
        }
        self.image.read(offset, buf)
    }
}

/// A bar for `len` bytes, if standard error is a terminal and they are many.
fn bar(len: u64) -> ProgressBar {
    if len < LONG {
        return ProgressBar::hidden();
    }
    let style = "index  [{bar:30}] {bytes}/{total_bytes}  {bytes_per_sec}";
    let style =
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    // It is hidden if it is no terminal.
    ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr())
        .with_style(style.progress_chars("=> "))
}

/// A bitmap for all pages of a range.
fn bitmap(layout: &Layout) -> Result<Vec<AtomicU64>> {
    let mut words = Vec::new();
    Bitmap::words(layout.pages())
        .and_then(|len| {
            words.try_reserve_exact(len).ok()?;
            words.resize_with(len, || AtomicU64::new(0));
            Some(())
        })
        .with_context(|| format!("there is no memory for {} pages", layout.pages()))?;
    Ok(words)
}

fn scan(image: &Image, layout: &Layout) -> Result<Scan> {
    let held = bitmap(layout)?;
    let bar = bar(layout.index_pages().saturating_mul(PAGE_SIZE));
    let medium = Watched { image, bar };
    let scan = scan::scan(&medium, layout, Bitmap::new(&held), None);
    medium.bar.finish_and_clear();
    Ok(scan)
}

impl Report {
    /// Looks for what is in `image`.
    pub(crate) fn new(image: &Image) -> Result<Self> {
        let found = superblock::probe(image);
        let (status, index) = match &found {
            Ok(found) => {
                let scan = scan(image, &found.superblock.layout)?;
                let is_damaged = matches!(found.repair, Some((_, Repair::Damaged(_))));
                let status = if is_damaged || scan.faults != 0 {
                    Status::Faults
                } else {
                    Status::InOrder
                };
                let is_blk = found.superblock.layout.blocks() != 0;
                (status, is_blk.then(|| Index::new(&scan)))
            }
            Err(error) => (status_of(error), None),
        };

        let is_large_enough = !matches!(found, Err(ProbeError::TooSmall { .. }));
        let copy = |place| Copy::new(image, place, found.as_ref().ok());
        Ok(Self {
            status,
            status_of_superblock: match &found {
                Ok(_) => Status::InOrder,
                Err(error) => status_of(error),
            },
            error: found.as_ref().err().map(message),
            range: Some(Range {
                start: image.start(),
                size: image.size(),
            }),
            superblock: found
                .as_ref()
                .ok()
                .map(|found| Fields::new(&found.superblock)),
            copies: is_large_enough.then(|| Copies {
                primary: copy(Place::Primary),
                second: copy(Place::Second),
            }),
            index,
        })
    }

    /// Nothing could be found, because of `error`.
    pub(crate) fn failed(error: &Error) -> Self {
        Self {
            status: Status::Error,
            status_of_superblock: Status::Error,
            error: Some(format!("{error:#}")),
            range: None,
            superblock: None,
            copies: None,
            index: None,
        }
    }

    /// Whether it is in order, and if not, why.
    pub(crate) fn check(&self) -> String {
        let mut text = Text::default();
        if let Some(superblock) = &self.superblock {
            text.line(format_args!(
                "format {}, {} of {}, generation {}",
                superblock.format,
                superblock.uuid,
                pages(superblock.pages),
                superblock.generation
            ));
            if superblock.state == State::InUse.to_string() {
                text.line(format_args!(
                    "in use: its last user lost power, or somebody uses it now"
                ));
            }
        }
        if let Some(error) = &self.error {
            text.line(format_args!("{error}"));
        }
        for (place, copy) in self.copies() {
            // Without one that counts, the error has it.
            match (copy.status, &copy.fault) {
                (CopyStatus::Interrupted, Some(fault)) => {
                    text.line(format_args!("{place}: {fault}; the driver repairs it"))
                }
                (CopyStatus::Damaged, Some(fault)) if self.superblock.is_some() => {
                    text.line(format_args!(
                        "{place}: {fault}; the other one counts, and the driver repairs it"
                    ))
                }
                _ => {}
            }
        }
        self.index(&mut text);
        match self.status {
            Status::InOrder => text.line(format_args!("in order")),
            Status::Faults => text.line(format_args!("there are faults")),
            Status::Error => {}
        }
        text.0
    }

    /// What both superblocks say, and the index.
    pub(crate) fn show(&self) -> String {
        let mut text = Text::default();
        if let Some(range) = &self.range {
            text.field(
                "range",
                format_args!("{} from {:#x} on", Size(range.size), range.start),
            );
        }
        for (place, copy) in self.copies() {
            text.line(format_args!(""));
            let status = match copy.status {
                CopyStatus::Valid => "valid",
                CopyStatus::Interrupted => "interrupted",
                CopyStatus::Damaged => "damaged",
                CopyStatus::Missing => "missing",
            };
            match &copy.fault {
                Some(fault) => text.line(format_args!("{place}: {status}, {fault}")),
                None => text.line(format_args!("{place}: {status}")),
            }
            if let Some(fields) = &copy.fields {
                text.field("format", format_args!("{}", fields.format));
                text.field("UUID", format_args!("{}", fields.uuid));
                text.field("state", format_args!("{}", fields.state));
                text.field("generation", format_args!("{}", fields.generation));
                text.field("range", format_args!("{}", pages(fields.pages)));
                if fields.blocks != 0 {
                    text.field("index", format_args!("{}", pages(fields.index_pages)));
                    text.field("disk", format_args!("{}", pages(fields.blocks)));
                    text.field("spare", format_args!("{}", pages(fields.spare_pages)));
                }
            }
        }
        if let Some(error) = &self.error {
            text.line(format_args!("\n{error}"));
        }
        if self.index.is_some() {
            text.line(format_args!(""));
        }
        self.index(&mut text);
        text.0
    }

    fn copies(&self) -> impl Iterator<Item = (Place, &Copy)> {
        self.copies.iter().flat_map(|copies| {
            [
                (Place::Primary, &copies.primary),
                (Place::Second, &copies.second),
            ]
        })
    }

    fn index(&self, text: &mut Text) {
        let (Some(index), Some(superblock)) = (&self.index, &self.superblock) else {
            return;
        };
        text.line(format_args!(
            "{} of {} blocks have data, {}",
            index.mapped,
            superblock.blocks,
            Size(index.mapped.saturating_mul(PAGE_SIZE))
        ));
        if index.faults != 0 {
            text.line(format_args!("{} fault(s) of the index:", index.faults));
        }
        for fault in &index.first {
            text.line(format_args!("  {}", fault.message));
        }
        let more = index.faults.saturating_sub(index.first.len() as u64);
        if more != 0 {
            text.line(format_args!("  and {more} more"));
        }
    }
}

impl Copy {
    fn new(image: &Image, place: Place, found: Option<&Found>) -> Self {
        let copy = superblock::read(image, place);
        let repair = found
            .and_then(|found| found.repair)
            .filter(|(other, _)| *other == place)
            .map(|(_, repair)| repair);
        let (status, fault) = match (&copy, repair) {
            (_, Some(Repair::Damaged(fault))) => (CopyStatus::Damaged, Some(fault.to_string())),
            (_, Some(repair)) => (CopyStatus::Interrupted, Some(repair.to_string())),
            (Err(fault @ Fault::Magic(_)), None) => (CopyStatus::Missing, Some(fault.to_string())),
            (Err(fault), None) => (CopyStatus::Damaged, Some(fault.to_string())),
            (Ok(_), None) => (CopyStatus::Valid, None),
        };
        Self {
            status,
            fault,
            fields: copy.ok().as_ref().map(Fields::new),
        }
    }
}

/// What it means that there is no superblock that counts.
fn status_of(error: &ProbeError) -> Status {
    match error {
        ProbeError::Damaged {
            primary: Fault::Unreadable(_),
            second: Fault::Unreadable(_),
        } => Status::Error,
        ProbeError::Damaged { .. } => Status::Faults,
        _ => Status::Error,
    }
}

/// What is said of an error: what the driver says, and what else there is to do here.
fn message(error: &ProbeError) -> String {
    match error {
        ProbeError::Size { superblock, .. } => format!(
            "{error} (here: --size={})",
            superblock.saturating_mul(PAGE_SIZE)
        ),
        _ => error.to_string(),
    }
}

/// A number of pages, and their size.
fn pages(pages: u64) -> String {
    format!("{pages} pages ({})", Size(pages.saturating_mul(PAGE_SIZE)))
}

/// Lines of a report.
#[derive(Default)]
struct Text(String);

impl Text {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // A string takes all that is written.
        let _ = writeln!(self.0, "{line}");
    }

    fn field(&mut self, name: &str, value: std::fmt::Arguments<'_>) {
        self.line(format_args!("  {name:<12}{value}"));
    }
}
