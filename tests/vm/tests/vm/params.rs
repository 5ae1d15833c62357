// SPDX-License-Identifier: GPL-2.0-only

//! What an administrator writes: right, wrong, and what the driver says of it.

use anyhow::{ensure, Context, Result};
use vm_tests::{boot, load, log, setup, stock, unload, Trace, Use, GIB, MIB, UPPER};
use xtask::exec;
use xtask::flavour::Flavour;
use xtask::vm::PMEM_KO;

const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const ENXIO: i32 = 6;

/// A line of parameters, the error, and what the message must say: the parameter, its value, the remedy.
///
/// The machine has System RAM from 0 to 1 GiB but for 64 MiB at 512 MiB, and 1 GiB reserved at 4 GiB.
const BAD: &[(&str, i32, &[&str])] = &[
    // What is missing.
    (
        "pmem_virtio=0 iopmem=0",
        EINVAL,
        &[
            "no range is given",
            "memmap=",
            "pmem_start=4G pmem_size=2GiB",
        ],
    ),
    (
        "pmem_start=4G",
        EINVAL,
        &["pmem_size", "nothing is given", "512MiB"],
    ),
    (
        "pmem_size=1G",
        EINVAL,
        &["pmem_start", "nothing is given", "512MiB"],
    ),
    (
        "pmem_start=4G, pmem_size=512M,512M",
        EINVAL,
        &["pmem_start", "nothing is given"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=",
        EINVAL,
        &["pmem_count=", "is not a count"],
    ),
    // What is no size.
    (
        "pmem_start=4G pmem_size=1gb",
        EINVAL,
        &["pmem_size=1gb", "not a unit", "KiB to EiB"],
    ),
    (
        "pmem_start=4X pmem_size=1G",
        EINVAL,
        &["pmem_start=4X", "not a unit"],
    ),
    (
        "pmem_start=4G pmem_size=512KB",
        EINVAL,
        &["pmem_size=512KB", "two ways", "KiB"],
    ),
    (
        "pmem_start=4G pmem_size=0.5G",
        EINVAL,
        &["pmem_size=0.5G", "fraction", "smaller unit"],
    ),
    (
        "pmem_start=4G pmem_size=-1G",
        EINVAL,
        &["pmem_size=-1G", "sign"],
    ),
    (
        "pmem_start=-4G pmem_size=1G",
        EINVAL,
        &["pmem_start=-4G", "sign"],
    ),
    (
        "pmem_start=4G pmem_size=G",
        EINVAL,
        &["pmem_size=G", "does not start with a number"],
    ),
    (
        "pmem_start=4G pmem_size=1G@4G",
        EINVAL,
        &["pmem_size=1G@4G", "@4G", "remove it"],
    ),
    (
        "pmem_start=4G pmem_size=17179869184G",
        EINVAL,
        &["pmem_size=17179869184G", "too large", "16EiB"],
    ),
    (
        "pmem_start=18446744073709551616 pmem_size=1G",
        EINVAL,
        &["pmem_start=18446744073709551616", "too large"],
    ),
    // What is no count.
    (
        "pmem_start=4G pmem_size=1G pmem_count=2K",
        EINVAL,
        &["pmem_count=2K", "not a count"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=-1",
        EINVAL,
        &["pmem_count=-1", "sign"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=4294967296",
        EINVAL,
        &["pmem_count=4294967296", "too large", "4294967295"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_first=x",
        EINVAL,
        &["pmem_first=x"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=2 pmem_first=4294967295",
        EINVAL,
        &["pmem_first", "lower"],
    ),
    // Lists.
    (
        "pmem_start=4G,4608M pmem_size=512M",
        EINVAL,
        &["pmem_size has 1", "2 range(s)", "commas"],
    ),
    (
        "pmem_start=4G pmem_size=512M,512M",
        EINVAL,
        &["pmem_size has 2", "1 range(s)"],
    ),
    (
        "pmem_start=4G,4608M pmem_size=512M,512M pmem_count=1,1,1",
        EINVAL,
        &["pmem_count has 3", "2 range(s)"],
    ),
    // Numbers that make no disks.
    (
        "pmem_start=4G pmem_size=0",
        EINVAL,
        &["pmem_size=0", "size 0", "at least 2MiB"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=0",
        EINVAL,
        &["pmem_count=0", "0 disks", "1 or more"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=513",
        EINVAL,
        &["pmem_count=513", "too small", "the most is 512"],
    ),
    (
        "pmem_start=4G pmem_size=1M",
        EINVAL,
        &["pmem_size=1M", "too small", "2MiB"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_count=4294967295",
        EINVAL,
        &["pmem_count=4294967295", "too small", "the most is 512"],
    ),
    (
        "pmem_start=0x100001000 pmem_size=512M",
        EINVAL,
        &[
            "0x100001000",
            "2MiB aligned",
            "pmem_start=0x100200000 pmem_size=510MiB",
        ],
    ),
    (
        "pmem_start=0x100001000 pmem_size=2M",
        EINVAL,
        &["0x100001000", "2MiB aligned", "reserve a larger range"],
    ),
    (
        "pmem_start=16777215T pmem_size=2T",
        EINVAL,
        &["pmem_start=16777215T", "beyond the last address"],
    ),
    (
        "pmem_start=4G,4G pmem_size=512M,256M",
        EINVAL,
        &["overlap", "pmem_start"],
    ),
    (
        "pmem_start=4608M,4G pmem_size=512M,514M",
        EINVAL,
        &["overlap", "pmem_size"],
    ),
    // Options.
    (
        "pmem_start=4G pmem_size=1G pmem_lbs=1000",
        EINVAL,
        &["pmem_lbs=1000", "512 or 4096"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_lbs=0",
        EINVAL,
        &["pmem_lbs=0", "512 or 4096"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_lbs=8192",
        EINVAL,
        &["pmem_lbs=8192", "512 or 4096"],
    ),
    (
        "pmem_start=4G pmem_size=1G pmem_e820=2",
        EINVAL,
        &["pmem_e820=2", "1 or 0"],
    ),
    // Ranges that are not ours.
    (
        "pmem_start=64M pmem_size=64M",
        EBUSY,
        &[
            "0x04000000-0x07ffffff",
            "System RAM",
            "memmap=0x4000000$0x4000000",
        ],
    ),
    (
        "pmem_start=512M pmem_size=66M",
        EBUSY,
        &["0x20000000-0x241fffff", "System RAM", "memmap="],
    ),
    (
        "pmem_start=510M pmem_size=4M",
        EBUSY,
        &["System RAM", "memmap="],
    ),
    (
        "pmem_start=0 pmem_size=4M",
        EBUSY,
        &["0x00000000-0x003fffff", "System RAM"],
    ),
    (
        "pmem_start=0xfec00000 pmem_size=2M",
        EBUSY,
        &["0xfec00000", "claimed by another driver", "/proc/iomem"],
    ),
    (
        "pmem_start=1P pmem_size=1G",
        ENXIO,
        &["0x4000000000000", "can map", "pmem_start"],
    ),
    // The first range is good, and must be given back.
    (
        "pmem_start=4G,0xfec00000 pmem_size=512M,2M",
        EBUSY,
        &["0xfec00000", "claimed by another driver"],
    ),
    (
        "pmem_start=4G,64M pmem_size=512M,64M pmem_count=2,1",
        EBUSY,
        &["System RAM", "memmap="],
    ),
];

/// An administrator who makes a mistake must learn which, and must be able to try again without a reboot.
#[test]
fn bad_parameters_name_their_fault_and_leave_no_trace() -> Result<()> {
    let machine =
        stock()?
            .range(Use::Reserved, UPPER, GIB)
            .range(Use::Reserved, 512 * MIB, 64 * MIB);
    boot(machine, |vm| {
        // What a first load leaves in any case, such as a taint, is there before the first look.
        vm.insmod(PMEM_KO, "pmem_virtio=0 iopmem=0")?.unwrap_err();
        let before = Trace::of(vm)?;
        let mut faults = Vec::new();
        for (params, errno, needles) in BAD {
            vm.sh("dmesg -c >/dev/null")?;
            let refused = match vm.insmod(PMEM_KO, params)? {
                Err(refused) => refused.errno,
                Ok(()) => {
                    faults.push(format!("{params:?} was accepted"));
                    unload(vm)?;
                    continue;
                }
            };
            let said = log(vm)?.join("\n");
            if refused != *errno {
                faults.push(format!("{params:?}: errno {refused}, not {errno}: {said}"));
            }
            for needle in *needles {
                if !said.contains(needle) {
                    faults.push(format!("{params:?}: {needle:?} is not in {said:?}"));
                }
            }
            Trace::of(vm)?
                .check(&before)
                .with_context(|| format!("after {params:?}"))?;
        }
        ensure!(faults.is_empty(), "{}", faults.join("\n"));
        load(vm, "pmem_start=4G,512M pmem_size=1G,64M")
    })
}

/// All the ways to write a size must make the same disk, and sysfs must show what was written.
#[test]
fn sizes_in_every_unit_make_the_same_disk() -> Result<()> {
    boot(stock()?, |vm| {
        for (start, size) in [
            ("4G", "64M"),
            ("0x100000000", "0x4000000"),
            ("4294967296", "67108864"),
            ("4294967296B", "67108864B"),
            ("4GiB", "64MiB"),
            ("4194304K", "65536KiB"),
            ("4g", "64m"),
        ] {
            load(vm, &format!("pmem_start={start} pmem_size={size}"))?;
            let sectors = vm.text("/sys/block/pmem0/size")?;
            assert_eq!(sectors.trim(), "131072", "{start} {size}");
            let iomem = vm.text("/proc/iomem")?;
            assert!(
                iomem.contains("100000000-103ffffff : pmem"),
                "{start} {size}: {iomem}"
            );
            for (param, value) in [
                ("pmem_start", start),
                ("pmem_size", size),
                ("pmem_count", "1"),
                ("pmem_lbs", "512"),
            ] {
                let shown = vm.text(&format!("/sys/module/pmem/parameters/{param}"))?;
                assert_eq!(shown.trim(), value, "{param}");
            }
            unload(vm)?;
        }
        // Decimal units: 67 MB is not a multiple of 2 MiB, and the rest is told.
        load(vm, "pmem_start=4G pmem_size=67MB")?;
        assert_eq!(
            vm.text("/sys/block/pmem0/size")?.trim(),
            (31 * 4096 / 2 * 2).to_string()
        );
        let said = log(vm)?.join("\n");
        assert!(said.contains("left over"), "{said}");
        Ok(())
    })
}

/// `modinfo` is the first that an administrator reads.
#[test]
fn modinfo_tells_all() -> Result<()> {
    let setup = setup(Flavour::Cloud)?;
    let module = setup.module.as_ref().context("no module")?;
    let text = exec::stdout(setup.root.command("modinfo").arg(&module.ko))?;
    let fields = [
        ("license:", &["GPL"][..]),
        ("author:", &["pmem"]),
        ("description:", &["persistent memory"]),
        ("vermagic:", &[&setup.kernel.release]),
        (
            "parm:           pmem_start:",
            &["address", "KiB", "Example: 4G", "(charp)"],
        ),
        (
            "parm:           pmem_size:",
            &["unit", "Example: 2GiB", "(charp)"],
        ),
        (
            "parm:           pmem_count:",
            &["Default: 1", "Example: 1,4", "(charp)"],
        ),
        (
            "parm:           pmem_lbs:",
            &["bytes", "512 or 4096", "Default: 512", "(charp)"],
        ),
        (
            "parm:           pmem_cache:",
            &["wb", "wt", "wc", "uc", "DAX", "Default: wb", "(charp)"],
        ),
        (
            "parm:           pmem_memmap:",
            &["ram", "dev", "1/64", "Default: ram", "(charp)"],
        ),
        (
            "parm:           pmem_memmap_force:",
            &["header", "0 or 1", "Default: 0", "(charp)"],
        ),
        (
            "parm:           pmem_copy:",
            &["nt", "wb", "auto", "Default: auto", "(charp)"],
        ),
        (
            "parm:           pmem_e820:",
            &["memmap=nn!ss", "nd_e820", "0 or 1", "Default: 0", "(charp)"],
        ),
        (
            "parm:           pmem_virtio:",
            &[
                "virtio-pmem",
                "other driver",
                "0 or 1",
                "Default: 1",
                "(charp)",
            ],
        ),
        (
            "parm:           iopmem:",
            &["PCI function", "0 or 1", "Default: 1", "(charp)"],
        ),
        (
            "parm:           iopmem_bar:",
            &["0 to 5", "largest", "Example: 2", "(charp)"],
        ),
        (
            "parm:           iopmem_cache:",
            &["wc, uc or wb", "Default: wc", "(charp)"],
        ),
        (
            "parm:           iopmem_dax:",
            &["struct pages", "Default: 1", "(charp)"],
        ),
        (
            "parm:           iopmem_p2pdma:",
            &["end of the BAR", "Default: 0", "Example: 64MiB", "(charp)"],
        ),
        (
            "parm:           iopmem_persistent:",
            &["without power", "Default: 0", "(charp)"],
        ),
        (
            "parm:           pmem_first:",
            &["/dev/pmemN", "Default: 0", "Example: 1", "(charp)"],
        ),
        (
            "parm:           kmem_start:",
            &["address", "RAM and storage", "Example: 4G", "(charp)"],
        ),
        (
            "parm:           kmem_size:",
            &["unit", "Example: 2GiB", "(charp)"],
        ),
        (
            "parm:           kmem_format:",
            &["none", "blk", "/dev/kmem", "Example: blk", "(charp)"],
        ),
        (
            "parm:           kmem_format_force:",
            &["lose", "0 or 1", "Default: 0", "(charp)"],
        ),
        (
            "parm:           kmem_atomic:",
            &["power loss", "0 or 1", "Default: 1", "(charp)"],
        ),
        (
            "parm:           kmem_scrub:",
            &["Zero", "0 or 1", "Default: 0", "(charp)"],
        ),
        (
            "parm:           kmem_dax:",
            &["device-dax", "0 or 1", "Default: 0", "(charp)"],
        ),
    ];
    for (field, needles) in fields {
        let line = text
            .lines()
            .find(|line| line.starts_with(field))
            .with_context(|| format!("no {field} in:\n{text}"))?;
        for needle in needles {
            assert!(line.contains(needle), "{needle:?} is not in {line:?}");
        }
    }
    let params = text
        .lines()
        .filter(|line| line.starts_with("parm:"))
        .count();
    let known = fields
        .iter()
        .filter(|(field, _)| field.starts_with("parm:"))
        .count();
    assert_eq!(params, known, "{text}");
    Ok(())
}
