// SPDX-License-Identifier: GPL-2.0-only

//! `pmemctl` on copies of the files by which systems tell of themselves: what it proposes, finds and lists.

use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// A machine with 3 GiB below 4 GiB, and 4 GiB above on each of two nodes.
const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000fffff : Reserved
00100000-bfffffff : System RAM
  20000000-21ffffff : Kernel code
  22000000-22ffffff : Kernel rodata
  23000000-23bfffff : Kernel data
  24000000-24ffffff : Kernel bss
c0000000-febfffff : PCI Bus 0000:00
100000000-2ffffffff : System RAM
  180000000-183ffffff : Crash kernel
";

const RELEASE: &str = "7.3.4+deb13-amd64";

/// The files of a system.
struct System(TempDir);

impl System {
    fn new(files: &[(&str, &str)]) -> Self {
        let system = Self(tempfile::tempdir().unwrap());
        system.write("/proc/sys/kernel/osrelease", RELEASE);
        system.write("/proc/cmdline", "root=/dev/vda1 ro quiet\n");
        system.write("/proc/iomem", IOMEM);
        system.write("/etc/default/grub", "GRUB_CMDLINE_LINUX=\"\"\n");
        system.write("/sys/devices/system/memory/block_size_bytes", "8000000\n");
        for (path, text) in files {
            system.write(path, text);
        }
        system
    }

    /// With the module of the kernel that runs.
    fn with_module(files: &[(&str, &str)]) -> Self {
        let system = Self::new(files);
        let dir = format!("/lib/modules/{RELEASE}");
        system.write(
            &format!("{dir}/modules.dep"),
            "kernel/drivers/nvdimm/nd_pmem.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz\nupdates/dkms/pmem.ko.xz:\n",
        );
        system.write(&format!("{dir}/updates/dkms/pmem.ko.xz"), "");
        system
    }

    /// With the RAM above 4 GiB on nodes: 4 GiB each.
    fn with_nodes(self) -> Self {
        const BLOCK: u64 = 128 << 20;
        for block in 0..(12 << 30) / BLOCK {
            let address = block * BLOCK;
            let node = u32::from(address >= 8 << 30);
            let dir = format!("/sys/devices/system/node/node{node}/memory{block}");
            fs::create_dir_all(self.path(&dir)).unwrap();
        }
        self
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    /// The exit code, and what was printed.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_pmemctl"))
            .arg("--sysroot")
            .arg(self.0.path())
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

    /// The plan, as JSON.
    fn plan(&self, arguments: &[&str]) -> Value {
        let (code, stdout, stderr) = self.run(&[&["plan", "--json"], arguments].concat());
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    }

    /// Why there is no plan.
    fn refused(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(&[&["plan"], arguments].concat());
        assert_eq!((code, stdout.as_str()), (8, ""), "{stderr}");
        stderr
    }

    /// What the doctor says, which must have `problems` problems.
    fn doctor(&self, problems: usize) -> String {
        let (code, stdout, stderr) = self.run(&["doctor"]);
        assert_eq!(stderr, "");
        let found = stdout.matches("PROBLEM").count();
        assert_eq!(found, problems, "{stdout}");
        assert_eq!(code, if problems == 0 { 0 } else { 4 }, "{stdout}");
        stdout
    }
}

const G: u64 = 1 << 30;

/// Each range is where a boot with it works: in RAM, clear of what cannot move, and of one node.
#[test]
fn a_plan_is_a_range_that_works() {
    let system = System::new(&[]).with_nodes();
    for (arguments, start) in [
        (&["2GiB"][..], 4 * G),
        // Behind the crash kernel, as there is no room before it.
        (&["3GiB"], 8 * G),
        (&["64M", "--node", "1"], 8 * G),
        (&["64M", "--node", "0"], 4 * G),
    ] {
        let plan = system.plan(arguments);
        assert_eq!(plan["start"], start, "{arguments:?}");
    }
    let plan = system.plan(&["3G", "--count", "3"]);
    assert_eq!(plan["node"], 1);
    assert_eq!(plan["memmap"], "memmap=3G$8G");
    assert_eq!(plan["grub"], r"memmap=3G\\\$8G");
    assert_eq!(
        plan["options"],
        "options pmem pmem_start=8G pmem_size=3G pmem_count=3"
    );
    let left = plan["ram"].as_u64().unwrap() - plan["ram_left"].as_u64().unwrap();
    assert_eq!(left, 3 * G);
}

#[test]
fn a_plan_that_cannot_work_is_refused() {
    let system = System::new(&[]).with_nodes();
    for (arguments, why) in [
        (&["5G"][..], "the largest has 4GiB"),
        (&["2G", "--node", "2"], "those that have are 0, 1"),
        (&["3M"], "take 4MiB"),
        (&["0"], "take 2MiB"),
        (&["2M", "--count", "2"], "the most is 1"),
        (&["64M", "--count", "0"], "0 disks"),
    ] {
        let error = system.refused(arguments);
        assert!(error.contains(why), "{arguments:?}: {error}");
    }
    // RAM that the system itself needs.
    let small = System::new(&[(
        "/proc/iomem",
        "00100000-0fffffff : System RAM\n100000000-13fffffff : System RAM\n",
    )]);
    let error = small.refused(&["1G"]);
    assert!(
        error.contains("at least 512.00 MiB must be left"),
        "{error}"
    );
}

/// Users do not see addresses in /proc/iomem, but those that firmware gave.
#[test]
fn a_plan_without_root_is_by_the_map_of_the_firmware() {
    let entry = |n: u32, first: &str, last: &str| {
        [("start", first), ("end", last), ("type", "System RAM")].map(|(file, text)| {
            (
                format!("/sys/firmware/memmap/{n}/{file}"),
                format!("{text}\n"),
            )
        })
    };
    let mut files: Vec<(String, String)> = Vec::new();
    files.extend(entry(0, "0x100000", "0xbfffffff"));
    files.extend(entry(1, "0x100000000", "0x2ffffffff"));
    let mut files: Vec<(&str, &str)> = files
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    let hidden = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n";
    files.push(("/proc/iomem", hidden));
    let system = System::new(&files);
    let plan = system.plan(&["2G"]);
    assert_eq!(plan["start"], 4 * G);
    assert!(plan["notes"][0]
        .as_str()
        .unwrap()
        .contains("run it as root"));

    let nothing = System::new(&[("/proc/iomem", hidden)]);
    assert!(nothing.refused(&["2G"]).contains("run this as root"));
}

#[test]
fn a_plan_is_written_once_and_shown_before() {
    let system = System::new(&[("/etc/modprobe.d/pmem.conf", "options pmem pmem_start=1G\n")]);
    let (code, _, shown) = system.run(&["plan", "2G", "--write"]);
    assert_eq!(code, 0, "{shown}");
    for line in [
        "-options pmem pmem_start=1G\n",
        "+options pmem pmem_start=4G pmem_size=2G\n",
        "+++ /etc/default/grub.d/pmem.cfg\n",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert!(system
        .read("/etc/modules-load.d/pmem.conf")
        .contains("\npmem\n"));

    // What a shell makes of it is what grub-mkconfig writes into grub.cfg.
    let script = format!(
        "GRUB_CMDLINE_LINUX=quiet; . {}; printf %s \"$GRUB_CMDLINE_LINUX\"",
        system.path("/etc/default/grub.d/pmem.cfg").display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(output.stdout, br"quiet memmap=2G\$4G");

    let (code, _, shown) = system.run(&["plan", "2G", "--write", "--yes"]);
    assert_eq!(
        (code, shown.as_str()),
        (0, "pmemctl: all of it is written already\n")
    );

    fs::remove_file(system.path("/etc/default/grub")).unwrap();
    let error = system.run(&["plan", "4G", "--write"]).2;
    assert!(error.contains("not booted by GRUB"), "{error}");
    assert!(system
        .read("/etc/modprobe.d/pmem.conf")
        .contains("pmem_size=2G"));
}

/// One thing is wrong with each system; the doctor finds that, and nothing else.
#[test]
fn each_fault_has_its_diagnosis_and_its_remedy() {
    let options = (
        "/etc/modprobe.d/pmem.conf",
        "options pmem pmem_start=4G pmem_size=2G\n",
    );
    let command_line = |text: &'static str| ("/proc/cmdline", text);
    let good = command_line("quiet memmap=2G$4G\n");
    let reserved = IOMEM.replace(
        "100000000-2ffffffff : System RAM\n",
        "100000000-17fffffff : Reserved\n180000000-2ffffffff : System RAM\n",
    );
    let reserved = ("/proc/iomem", reserved.as_str());
    let legacy = IOMEM.replace(
        "100000000-2ffffffff : System RAM\n",
        "100000000-17fffffff : Persistent Memory (legacy)\n  100000000-17fffffff : namespace0.0\n\
         180000000-2ffffffff : System RAM\n",
    );
    let legacy = ("/proc/iomem", legacy.as_str());
    let loaded = ("/sys/module/pmem/parameters/pmem_start", "4G\n");
    let size = ("/sys/module/pmem/parameters/pmem_size", "2G\n");

    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let table: &[Case<'_>] = &[
        (
            &[options, loaded, size],
            &[
                "is RAM of the system",
                "nothing reserves it: give the kernel memmap=2G$4G",
                r"memmap=2G\\\$4G",
            ],
        ),
        (
            &[options, loaded, size, command_line("memmap=1G$5G")],
            &["is RAM of the system", "make them the same, memmap=2G$4G"],
        ),
        (
            &[
                good,
                reserved,
                (
                    "/etc/modprobe.d/pmem.conf",
                    "options pmem pmem_start=4097M pmem_size=2G\n",
                ),
                ("/sys/module/pmem/x", ""),
            ],
            &[
                "nearest range that works: pmem_start=0x100200000",
                "correct them in /etc/modprobe.d/pmem.conf",
            ],
        ),
        (
            &[command_line("memmap=2GG\n"), ("/sys/module/pmem/x", "")],
            &[
                "memmap=2GG on the kernel's command line reserves nothing",
                "GRUB has swallowed the $",
            ],
        ),
        (
            &[
                (
                    "/etc/default/grub.d/pmem.cfg",
                    "GRUB_CMDLINE_LINUX=\"memmap=2G\\\\\\$4G\"\n",
                ),
                ("/sys/module/pmem/x", ""),
            ],
            &[
                "/etc/default/grub.d/pmem.cfg has a memmap= that the running kernel was not given",
                "update-grub",
            ],
        ),
        (
            &[good, reserved, ("/sys/module/pmem/x", "")],
            &[
                "is reserved, but the module is not told of it",
                "pmem_start=4G pmem_size=2G",
            ],
        ),
        (
            &[
                command_line("memmap=2G!4G"),
                legacy,
                ("/sys/module/pmem/parameters/pmem_e820", "1\n"),
            ],
            &[
                "nd_e820 was first to have it, as namespace0.0",
                "module_blacklist=nd_e820",
            ],
        ),
        (
            &[command_line("memmap=2G!4G"), legacy, loaded, size],
            &[
                "is held by the kernel's own driver, as namespace0.0",
                "module_blacklist=nd_e820",
            ],
        ),
        (
            &[
                good,
                reserved,
                options,
                ("/sys/module/module/parameters/sig_enforce", "Y\n"),
            ],
            &[
                "the module is not signed",
                "(module.sig_enforce)",
                "mokutil --import /var/lib/dkms/mok.pub",
            ],
        ),
        (
            &[
                good,
                reserved,
                options,
                (
                    "/sys/kernel/security/lockdown",
                    "none [integrity] confidentiality\n",
                ),
            ],
            &["the module is not signed", "lockdown", "mokutil"],
        ),
        (
            &[good, reserved, options],
            &["the module is not loaded", "modprobe pmem"],
        ),
        (
            &[
                good,
                reserved,
                loaded,
                size,
                ("/etc/modprobe.d/x.conf", "blacklist pmem\n"),
            ],
            &["/etc/modprobe.d/x.conf keeps modprobe from loading the module"],
        ),
    ];
    for (files, texts) in table {
        let said = System::with_module(files).doctor(1);
        for text in *texts {
            assert!(said.contains(text), "{files:?}: not {text:?} in\n{said}");
        }
    }
}

#[test]
fn a_kernel_without_the_module_is_told_apart() {
    let release = ("/proc/sys/kernel/osrelease", "6.12.9+deb13-amd64");
    let other = ("/proc/sys/kernel/osrelease", "7.3.4+deb13-cloud-amd64");
    let rust = ("/boot/config-7.3.4+deb13-amd64", "CONFIG_RUST=y\n");
    let plain = (
        "/boot/config-7.3.4+deb13-amd64",
        "# CONFIG_RUST is not set\n",
    );
    let table: [(System, &str); 4] = [
        (
            System::new(&[release]),
            "the module is for Linux 7.2 and 7.3",
        ),
        (
            System::with_module(&[other]),
            "a module fits the one kernel that it was built for",
        ),
        (System::new(&[plain]), "was built without Rust"),
        (
            System::new(&[rust]),
            "apt install pmem-dkms linux-headers-7.3.4+deb13-amd64",
        ),
    ];
    for (system, text) in table {
        let said = system.doctor(1);
        assert!(said.contains(text), "{said}");
    }
}

#[test]
fn more_ranges_than_kaslr_knows_and_others_drivers_are_told() {
    let system = System::with_module(&[
        ("/proc/cmdline", "memmap=1G$4G,1G$5G,1G$6G memmap=1G$7G,1G$8G"),
        ("/sys/module/pmem/parameters/pmem_start", "8G\n"),
        ("/sys/module/pmem/parameters/pmem_size", "1G\n"),
        ("/proc/iomem", "240000000-27fffffff : Reserved\n200000000-23fffffff : Reserved\n  200000000-23fffffff : pmem0\n"),
        ("/sys/bus/virtio/devices/virtio0/device", "0x001b\n"),
    ]);
    let said = system.doctor(0);
    assert!(
        said.contains("5 memmap= ranges are more than the 4"),
        "{said}"
    );
    assert!(
        said.contains("virtio0 is a virtio-pmem device that no driver has"),
        "{said}"
    );
    assert!(said.contains("is the module's"), "{said}");
}

/// A disk with a partition that is mounted, and a range that is RAM and storage.
#[test]
fn disks_are_listed() {
    let block = "/sys/block/pmem0";
    let files: Vec<(String, &str)> = [
        ("size", "4194304\n"),
        ("dev", "259:0\n"),
        ("pmem0p1/dev", "259:1\n"),
        ("queue/dax", "1\n"),
        ("badblocks", "20 3\n66072 8\n"),
        ("pmem/provider", "memmap\n"),
        ("pmem/start", "0x100000000\n"),
        ("pmem/size", "2147483648\n"),
        ("pmem/node", "1\n"),
        ("pmem/cache", "wb\n"),
        ("pmem/durability", "durable at completion\n"),
        ("pmem/memmap", "ram\n"),
    ]
    .into_iter()
    .map(|(file, text)| (format!("{block}/{file}"), text))
    .chain([
        ("/sys/block/vda/size".to_owned(), "100\n"),
        (
            "/proc/self/mountinfo".to_owned(),
            "30 1 259:1 / /mnt/a\\040b rw - ext4 /dev/pmem0p1 rw,dax=always\n",
        ),
        ("/sys/devices/faux/kmem1/format".to_owned(), "blk\n"),
        ("/sys/devices/faux/kmem1/state".to_owned(), "online\n"),
        ("/sys/devices/faux/kmem1/ram".to_owned(), "1048576\n"),
        ("/sys/devices/faux/kmem1/data".to_owned(), "8192\n"),
        ("/sys/block/kmem1/size".to_owned(), "2048\n"),
    ])
    .collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), *b)).collect();
    let system = System::new(&files);
    let (code, text, _) = system.run(&["list"]);
    assert_eq!(code, 0);
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| {
            line.split("  ")
                .filter(|word| !word.is_empty())
                .map(str::trim)
                .collect()
        })
        .collect();
    assert_eq!(
        lines,
        [
            &[
                "DISK", "SIZE", "PROVIDER", "START", "NODE", "CACHE", "WRITES", "DAX", "BAD",
                "USED BY"
            ][..],
            &[
                "/dev/pmem0",
                "2GiB",
                "memmap",
                "0x100000000",
                "1",
                "wb",
                "durable at completion",
                "yes",
                "11",
                "/mnt/a b"
            ],
            &[],
            &["KMEM", "NODE", "FORMAT", "STATE", "RAM", "DATA", "DISK", "USED BY"],
            &["kmem1", "1", "blk", "online", "1MiB", "8KiB", "1MiB", "-"],
        ]
    );
    let (_, json, _) = system.run(&["list", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["disks"][0]["start"], 4 * G);
    assert_eq!(json["disks"][0]["bad_sectors"], 11);
    assert_eq!(json["disks"].as_array().unwrap().len(), 1);

    let (code, text, error) = System::new(&[]).run(&["list"]);
    assert_eq!((code, text.as_str()), (0, ""));
    assert!(error.contains("pmemctl doctor"), "{error}");
}

/// Whatever its files say, and whichever are missing: an answer, and no panic.
#[test]
fn junk_is_no_panic() {
    let junk = "\u{0}\u{1}ffffffffffffffff-0 : \n  x : y\n-\n0-ffffffffffffffff : System RAM\n      8-9 : z\n";
    let empty = System(tempfile::tempdir().unwrap());
    let full = System::with_module(&[
        ("/proc/iomem", junk),
        (
            "/proc/cmdline",
            "memmap= memmap=, memmap=$ memmap=99999999999999999999$1 memmap=0x memmap=16E$16E",
        ),
        (
            "/etc/modprobe.d/x.conf",
            "options pmem = pmem_start pmem_size=, kmem_start=1 kmem_size=\noptions pmem",
        ),
        ("/sys/module/pmem/parameters/pmem_start", "\u{ff}"),
        ("/sys/block/pmem0/pmem/provider", ""),
        ("/sys/block/pmem0/badblocks", "1\n2 x\n"),
        ("/proc/self/mountinfo", "1\n1 2\n1 2 3\n"),
    ])
    .with_nodes();
    for system in [&empty, &full] {
        for arguments in [
            &["doctor"][..],
            &["doctor", "--json"],
            &["list"],
            &["list", "--json"],
            &["plan", "2G"],
            &["plan", "8E"],
            &["plan", "18446744073707454464", "--node", "4294967295"],
        ] {
            let (code, _, error) = system.run(arguments);
            assert!(
                [0, 4, 8].contains(&code) && !error.contains("panicked"),
                "{arguments:?}: {error}"
            );
        }
    }
}

#[test]
fn completions_are_of_each_command() {
    let system = System::new(&[]);
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, _) = system.run(&["completions", shell]);
        assert_eq!(code, 0);
        for command in ["plan", "doctor", "list", "check", "show", "bench"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}

/// A disk that is not there is named.
#[test]
fn a_benchmark_of_nothing_says_so() {
    let (code, _, error) = System::new(&[]).run(&["bench", "/nowhere/pmem0"]);
    assert_eq!(code, 8);
    assert!(
        error.contains("/nowhere/pmem0 cannot be opened: No such file"),
        "{error}"
    );
}
