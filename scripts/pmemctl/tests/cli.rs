// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl` as a user runs it: what it prints, and the exit code that a script goes by.

use pmem_core::kmem::layout::Layout;
use pmem_core::kmem::superblock::{State, Superblock, Uuid};
use pmem_core::kmem::Block;
use serde_json::Value;
use std::io::Write;
use std::process::Command;
use tempfile::NamedTempFile;

const PAGE: usize = 4096;

/// The pages of a range with 600 blocks: two pages of index, and 64 spare pages.
const PAGES: usize = 2 + 2 + 600 + 64;

/// The blocks that have data.
const MAPPED: u64 = 100;

/// The number of the second superblock's page.
const SECOND: usize = PAGES - 1;

fn superblock(layout: Layout) -> Superblock {
    let new = Superblock::new(
        layout,
        Uuid(*b"\xde\xad\xbe\xef\0\0\x40\0\x80\0\0\0\0\0\0\x01"),
    );
    Superblock {
        generation: 5,
        ..new
    }
}

/// A range with a disk.
struct Disk {
    layout: Layout,
    bytes: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        let mut disk = Self {
            layout: Layout::blk(PAGES as u64).unwrap(),
            bytes: vec![0; PAGES * PAGE],
        };
        let superblock = superblock(disk.layout);
        disk.put(0, &superblock);
        disk.put(SECOND, &superblock);
        for block in 0..MAPPED {
            disk.map(block, disk.layout.data().end - 1 - block);
        }
        disk
    }

    fn put(&mut self, page: usize, superblock: &Superblock) {
        self.bytes[page * PAGE..][..128].copy_from_slice(&superblock.encode());
    }

    fn map(&mut self, block: u64, page: u64) {
        let at = self.layout.entry_offset(Block(block)).unwrap() as usize;
        self.bytes[at..at + 8].copy_from_slice(&page.to_le_bytes());
    }
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The exit code, and what was printed.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_pmemctl"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Runs a command on an image, which it must not change.
fn run_on(command: &str, bytes: &[u8], options: &[&str]) -> (i32, String) {
    let image = file(bytes);
    let path = image.path().to_str().unwrap();
    let (code, stdout, stderr) = run(&[&[command], options, &[path]].concat());
    assert!(std::fs::read(path).unwrap() == bytes, "it was changed");
    assert_eq!(stderr.is_empty(), !stdout.is_empty(), "{stdout}{stderr}");
    (code, stdout + &stderr)
}

fn check(bytes: &[u8]) -> (i32, String) {
    run_on("check", bytes, &[])
}

fn json(command: &str, bytes: &[u8]) -> (i32, Value) {
    let (code, text) = run_on(command, bytes, &["--json"]);
    (code, serde_json::from_str(&text).unwrap())
}

#[test]
fn in_order() {
    let disk = Disk::new();
    let (code, text) = check(&disk.bytes);
    assert_eq!(
        text,
        "format blk, deadbeef-0000-4000-8000-000000000001 of 668 pages (2672KiB), generation 5\n\
         100 of 600 blocks have data, 400KiB\n\
         in order\n"
    );
    assert_eq!(code, 0);

    let mut bytes = vec![0; 8 * PAGE];
    let superblock = superblock(Layout::none(8).unwrap()).encode();
    bytes[..128].copy_from_slice(&superblock);
    bytes[7 * PAGE..][..128].copy_from_slice(&superblock);
    let (code, text) = check(&bytes);
    assert!(text.starts_with("format none, deadbeef-"), "{text}");
    assert!(text.ends_with("\nin order\n"), "{text}");
    assert_eq!(code, 0);
}

#[test]
fn what_a_power_loss_leaves_is_in_order() {
    let mut disk = Disk::new();
    let next = superblock(disk.layout).next(State::InUse);
    disk.put(0, &next);
    let (code, text) = check(&disk.bytes);
    assert!(text.contains("in use: its last user lost power, or somebody uses it now\n"));
    assert!(
        text.contains("second superblock: it is an older one, of generation 5; "),
        "{text}"
    );
    assert_eq!(code, 0);

    // The update of the second one was torn.
    disk.bytes[SECOND * PAGE + 72] = 6;
    let (code, text) = check(&disk.bytes);
    assert!(
        text.contains("second superblock: it was being written "),
        "{text}"
    );
    assert_eq!(code, 0);

    disk.put(SECOND, &next);
    let (code, text) = check(&disk.bytes);
    assert!(
        text.contains("in use: ") && !text.contains("superblock: "),
        "{text}"
    );
    assert_eq!(code, 0);
}

#[test]
fn faults_of_the_index() {
    let mut disk = Disk::new();
    let used = disk.layout.data().end - 1;
    disk.map(200, used);
    disk.map(300, 1);
    disk.map(599, 667);
    // The entry after that of the last block.
    disk.bytes[PAGE + 600 * 8] = 9;
    let (code, text) = check(&disk.bytes);
    assert!(
        text.ends_with(
            "100 of 600 blocks have data, 400KiB\n\
             4 fault(s) of the index:\n\
             \x20 block 200: page 666 has data of another block\n\
             \x20 block 300: page 1 cannot have data\n\
             \x20 block 599: page 667 cannot have data\n\
             \x20 block 600: page 9, but the disk has no such block\n\
             there are faults\n"
        ),
        "{text}"
    );
    assert_eq!(code, 4);

    let (code, value) = json("check", &disk.bytes);
    assert_eq!(code, 4);
    assert_eq!(value["status"], "faults");
    assert_eq!(value["index"]["mapped"], 100);
    assert_eq!(value["index"]["faults"], 4);
    assert_eq!(value["index"]["first"][0]["kind"], "twice");
    assert_eq!(value["index"]["first"][0]["block"], 200);
    assert_eq!(value["index"]["first"][0]["page"], 666);

    for block in 400..500 {
        disk.map(block, 0xffff_ffff);
    }
    let (code, text) = check(&disk.bytes);
    assert!(text.contains("104 fault(s) of the index:\n"), "{text}");
    assert!(text.contains("  and 96 more\n"), "{text}");
    assert_eq!(code, 4);
    // To show is not to check.
    assert_eq!(run_on("show", &disk.bytes, &[]).0, 0);
}

#[test]
fn faults_of_superblocks() {
    for page in [0, SECOND] {
        let mut disk = Disk::new();
        disk.bytes[page * PAGE + 33] ^= 4;
        let (code, text) = check(&disk.bytes);
        assert!(text.contains(" superblock: its checksum is "), "{text}");
        assert!(text.ends_with("there are faults\n"), "{text}");
        assert_eq!(code, 4);

        let (code, value) = json("check", &disk.bytes);
        let (name, other) = if page == 0 {
            ("primary", "second")
        } else {
            ("second", "primary")
        };
        assert_eq!(code, 4);
        assert_eq!(value["copies"][name]["status"], "damaged");
        assert_eq!(value["copies"][other]["status"], "valid");
        assert_eq!(value["superblock"]["generation"], 5);
    }

    let mut disk = Disk::new();
    disk.bytes[9] ^= 4;
    disk.bytes[SECOND * PAGE + 127] ^= 0x80;
    for command in ["check", "show"] {
        let (code, text) = run_on(command, &disk.bytes, &[]);
        assert!(
            text.contains("there is no valid superblock (primary: its checksum "),
            "{text}"
        );
        assert_eq!(code, 4);
    }

    // That of the format that was proposed in 2022.
    for page in [0, SECOND] {
        disk.bytes[page * PAGE + 28..][..100].fill(0);
    }
    let (code, text) = check(&disk.bytes);
    assert!(
        text.contains("proposed in 2022, which has no checksum"),
        "{text}"
    );
    assert_eq!(code, 4);
}

#[test]
fn what_is_no_range() {
    let (code, text) = check(&vec![0; 64 * PAGE]);
    assert!(
        text.starts_with("there is no superblock; kmem_format=none or "),
        "{text}"
    );
    assert_eq!(code, 8);

    let mut bytes = Disk::new().bytes;
    bytes.truncate(600 * PAGE);
    let (code, text) = check(&bytes);
    assert!(
        text.contains("give kmem_size=2736128 (here: --size=2736128)"),
        "{text}"
    );
    assert_eq!(code, 8);

    let (code, text) = check(&bytes[..PAGE]);
    assert!(text.contains("no room for two superblocks"), "{text}");
    assert_eq!(code, 8);

    let (code, text) = check(b"");
    assert!(
        text.contains("it is empty, or does not say its size; give --size"),
        "{text}"
    );
    assert_eq!(code, 8);

    let (code, value) = json("check", &vec![0; 64 * PAGE]);
    assert_eq!((code, &value["status"]), (8, &"error".into()));
    assert!(value["error"]
        .as_str()
        .unwrap()
        .starts_with("there is no superblock"));
    assert_eq!(value["copies"]["primary"]["status"], "missing");
}

#[test]
fn what_cannot_be_read() {
    for command in ["check", "show"] {
        let (code, stdout, stderr) = run(&[command, "/nonexistent/image"]);
        assert_eq!((code, stdout.as_str()), (8, ""));
        assert!(
            stderr.starts_with("pmemctl: /nonexistent/image: No such file"),
            "{stderr}"
        );

        let (code, _, stderr) = run(&[command, "/"]);
        assert_eq!(
            (code, stderr.as_str()),
            (8, "pmemctl: /: it is a directory\n")
        );

        let (code, stdout, _) = run(&[command, "--json", "/nonexistent/image"]);
        let value: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((code, &value["status"]), (8, &"error".into()));
    }
    let disk = Disk::new();
    for options in [
        ["--start=4GiB", "--size=2672KiB"],
        ["--start=4KiB", "--size=2672KiB"],
        ["--start=2672KiB", "--json"],
        ["--start=16777215TiB", "--size=4096"],
        ["--start=1MiB", "--size=0x7fffffffffffffff"],
    ] {
        assert_eq!(run_on("check", &disk.bytes, &options).0, 8, "{options:?}");
    }
    // A device without an end, of which all can be read, and one of which nothing can be.
    assert_eq!(run(&["check", "/dev/zero"]).0, 8);
    let (code, stdout, _) = run(&["check", "--size=1MiB", "/dev/zero"]);
    assert!(stdout.starts_with("there is no superblock"), "{stdout}");
    assert_eq!(code, 8);
    let (code, stdout, _) = run(&["check", "--size=1MiB", "/dev/null"]);
    assert!(
        stdout.contains("the medium cannot be read at byte 0x0"),
        "{stdout}"
    );
    assert_eq!(code, 8);
}

#[test]
fn wrong_arguments() {
    let image = file(&Disk::new().bytes);
    let path = image.path().to_str().unwrap();
    for arguments in [
        &[][..],
        &["check"],
        &["repair", path],
        &["check", "--force", path],
        &["check", "--size=1.5G", path],
        &["check", "--start=-1", path],
        &["check", path, path],
    ] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stdout.as_str()), (16, ""), "{arguments:?}");
        assert!(!stderr.is_empty());
    }
    let (_, _, stderr) = run(&["check", "--size=1.5G", path]);
    assert!(
        stderr.contains("write a whole number of a smaller unit"),
        "{stderr}"
    );

    for arguments in [&["--help"][..], &["check", "--help"], &["--version"]] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(!stdout.is_empty());
    }
}

#[test]
fn a_range_in_a_larger_file() {
    let disk = Disk::new();
    let mut memory = vec![0x55; 3 * PAGE + 512];
    let start = format!("--start={}B", memory.len());
    memory.extend_from_slice(&disk.bytes);
    assert_eq!(run_on("check", &memory, &[&start]).0, 0);

    memory.extend_from_slice(&[0x55; 5 * PAGE]);
    assert_eq!(run_on("check", &memory, &[&start, "--size=2672KiB"]).0, 0);
    // It says what was forgotten.
    let (code, text) = run_on("check", &memory, &[&start]);
    assert!(text.contains("(here: --size=2736128)"), "{text}");
    assert_eq!(code, 8);
    assert_eq!(run_on("check", &memory, &[]).0, 8);
}

#[test]
fn shows_both_superblocks() {
    let mut disk = Disk::new();
    disk.put(0, &superblock(disk.layout).next(State::InUse));
    let (code, text) = run_on("show", &disk.bytes, &[]);
    assert_eq!(
        text,
        "  range       2672KiB from 0x0 on\n\
         \n\
         primary superblock: valid\n\
         \x20 format      blk\n\
         \x20 UUID        deadbeef-0000-4000-8000-000000000001\n\
         \x20 state       in use\n\
         \x20 generation  6\n\
         \x20 range       668 pages (2672KiB)\n\
         \x20 index       2 pages (8KiB)\n\
         \x20 disk        600 pages (2400KiB)\n\
         \x20 spare       64 pages (256KiB)\n\
         \n\
         second superblock: interrupted, it is an older one, of generation 5\n\
         \x20 format      blk\n\
         \x20 UUID        deadbeef-0000-4000-8000-000000000001\n\
         \x20 state       clean\n\
         \x20 generation  5\n\
         \x20 range       668 pages (2672KiB)\n\
         \x20 index       2 pages (8KiB)\n\
         \x20 disk        600 pages (2400KiB)\n\
         \x20 spare       64 pages (256KiB)\n\
         \n\
         100 of 600 blocks have data, 400KiB\n"
    );
    assert_eq!(code, 0);

    let (code, value) = json("show", &disk.bytes);
    assert_eq!(code, 0);
    assert_eq!(value["status"], "in_order");
    assert_eq!(value["range"]["size"], PAGES * PAGE);
    assert_eq!(value["superblock"]["format"], "blk");
    assert_eq!(value["superblock"]["state"], "in use");
    assert_eq!(value["superblock"]["blocks"], 600);
    assert_eq!(value["copies"]["primary"]["generation"], 6);
    assert_eq!(value["copies"]["second"]["generation"], 5);
    assert_eq!(value["copies"]["second"]["status"], "interrupted");
    assert_eq!(value["index"]["mapped"], 100);
}
