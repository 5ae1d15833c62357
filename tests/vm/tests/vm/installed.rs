// SPDX-License-Identifier: GPL-2.0-only

//! The packages on Debian 13, as an administrator has it: installed by apt, booted by GRUB, mounted by fstab.

use anyhow::{ensure, Result};
use std::time::Duration;
use vm_tests::{alone, setup, Persistent, GIB, PROGRESS};
use xtask::flavour::Flavour;
use xtask::vm::{Builder, End, System, Vm};
use xtask::{deb, test};

/// systemd in an emulated machine takes a minute.
const BOOT: Duration = Duration::from_secs(400);
const LONG: Duration = Duration::from_secs(600);

/// What fstab has.
const MOUNT: &str = "/dev/disk/by-pmem/memmap-0x100000000 /srv ext4 dax=always,nofail,x-systemd.device-timeout=2min 0 2";

fn machine<'a>(memory: &'a Persistent, name: &str) -> Result<Builder<'a>> {
    let setup = setup(Flavour::Cloud)?;
    Ok(Builder::new(&setup.kernel, &setup.root, &PROGRESS)
        .name(format!("installed-{name}"))
        .persistent(memory)
        .no_ranges()
        .boot_timeout(BOOT))
}

/// Boots, and waits until systemd has started all that is to be started.
fn boot(machine: Builder<'_>) -> Result<Vm> {
    let vm = machine.start()?;
    // It fails when a unit has failed, which is looked at where it matters.
    vm.run_for(&["systemctl", "is-system-running", "--wait"], LONG)?;
    Ok(vm)
}

/// What `pmemctl doctor` finds, and its exit code.
fn doctor(vm: &Vm) -> Result<(String, End)> {
    let ran = vm.run_for(&["pmemctl", "doctor"], LONG)?;
    ensure!(ran.stderr.is_empty(), "{ran:?}");
    Ok((ran.stdout, ran.end))
}

/// `pmemctl doctor` finds a problem, which it says in these words.
fn diagnosed(vm: &Vm, words: &[&str]) -> Result<()> {
    let (said, end) = doctor(vm)?;
    ensure!(end == End::Exit(4), "{end:?}: {said}");
    let problems: String = said
        .lines()
        .skip_while(|line| !line.starts_with("PROBLEM"))
        .collect::<Vec<_>>()
        .join("\n");
    for word in words {
        ensure!(
            problems.contains(word),
            "no {word:?} in what it says:\n{said}"
        );
    }
    Ok(())
}

/// There is a disk, and the doctor is content.
fn is_well(vm: &Vm) -> Result<()> {
    let state = vm.run(&["systemctl", "is-system-running"])?;
    ensure!(
        state.stdout.trim() == "running",
        "{state:?}\n{}",
        vm.sh("systemctl --failed --no-legend; dmesg | tail -20")?
    );
    let (said, end) = doctor(vm)?;
    ensure!(end == End::Exit(0), "{end:?}: {said}");
    ensure!(said.contains("/dev/pmem0: 1GiB"), "{said}");
    Ok(())
}

#[test]
fn from_the_package_to_a_mounted_disk_and_back() -> Result<()> {
    if !test::is_full() {
        eprintln!("skipped: cargo xtask test --full has it");
        return Ok(());
    }
    alone(|| {
        let cloud = setup(Flavour::Cloud)?;
        let release = cloud.kernel.release.as_str();
        let other = release.replace("-cloud-", "-");
        let packages = deb::make(&cloud.root, &PROGRESS)?;
        let system = System::ensure(&packages, release, &other, &cloud.root, &PROGRESS)?;
        let said = system.log()?;
        let built = format!("Installing /lib/modules/{release}/updates/dkms/pmem.ko");
        ensure!(
            said.contains(&built),
            "DKMS has not built the module:\n{said}"
        );
        let disk = system.disk()?;
        let memory = Persistent::new(2 * GIB)?;
        let (kernel, initrd) = (system.kernel(release), system.initrd(release));
        let with = |name: &str, cmdline: &str| -> Result<Builder<'_>> {
            Ok(machine(&memory, name)?
                .disk_with(disk.path(), &kernel, &initrd)
                .cmdline(System::COMMAND_LINE)
                // Nobody is to wait for a disk that is not there.
                .cmdline("fstab=no")
                .cmdline(cmdline))
        };

        // As it was installed: nothing is reserved.
        // The plan keeps clear of the kernel, which is otherwise somewhere else at each boot.
        let vm = boot(with("first", "nokaslr")?)?;
        let (said, _) = doctor(&vm)?;
        ensure!(
            said.contains("the module is /lib/modules/") || said.contains("the module is loaded"),
            "{said}"
        );
        vm.sh_for(
            "grub-install /dev/vda >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
             pmemctl plan 1GiB --write --yes
             update-grub >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }",
            LONG,
        )?;
        vm.shut_down()?;

        // By GRUB, which must not swallow the $.
        let vm = boot(machine(&memory, "grub")?.disk(disk.path()))?;
        let line = vm.text("/proc/cmdline")?;
        ensure!(line.contains("memmap=1G$4G"), "{line}");
        is_well(&vm)?;
        vm.sh_for(
            &format!(
                "mkfs.ext4 -q -b 4096 /dev/pmem0
                 echo '{MOUNT}' >>/etc/fstab
                 systemctl daemon-reload
                 mount /srv
                 pmem-guest mmap-sync /srv/x 10000000 1
                 sync -f /etc/fstab"
            ),
            LONG,
        )?;
        vm.power_cut()?;

        let vm = boot(machine(&memory, "after-the-power-cut")?.disk(disk.path()))?;
        is_well(&vm)?;
        let mounted = vm.sh("findmnt -n -o SOURCE,FSTYPE,OPTIONS /srv")?;
        ensure!(
            mounted.contains("/dev/pmem0") && mounted.contains("dax=always"),
            "{mounted}"
        );
        vm.sh_for("pmem-guest verify /srv/x 10000000 1", LONG)?;
        let list = vm.sh("pmemctl list")?;
        ensure!(
            list.contains("durable at completion") && list.contains("/srv"),
            "{list}"
        );
        let link = vm.sh("readlink -f /dev/disk/by-uuid/$(blkid -s UUID -o value /dev/pmem0)")?;
        ensure!(link.trim() == "/dev/pmem0", "{link}");
        vm.shut_down()?;

        let faults: [(&str, &str, &[&str]); 5] = [
            (
                "no-reservation",
                "",
                &[
                    "meets System RAM; reserve it on the kernel's command line",
                    "pmem.cfg has a memmap= that the running kernel was not given",
                ],
            ),
            (
                "swallowed",
                "memmap=1GG",
                &[
                    "memmap=1GG on the kernel's command line reserves nothing",
                    "has swallowed the $",
                ],
            ),
            (
                "overlap",
                "memmap=512M$4G",
                &["RAM of the system", "make them the same"],
            ),
            (
                "nd_e820",
                "memmap=1G!4G modules_load=nd_e820,nd_pmem",
                &[
                    "held by the kernel's own driver",
                    "module_blacklist=nd_e820",
                ],
            ),
            (
                "signature",
                "memmap=1G$4G module.sig_enforce=1",
                &[
                    "the kernel takes only keys that it knows (module.sig_enforce)",
                    "mokutil --import",
                ],
            ),
        ];
        let mut wrong = Vec::new();
        for (name, cmdline, words) in faults {
            let vm = boot(with(name, cmdline)?)?;
            wrong.extend(
                diagnosed(&vm, words)
                    .err()
                    .map(|error| format!("{name}: {error:#}")),
            );
            vm.shut_down()?;
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        let (kernel, initrd) = (system.kernel(&other), system.initrd(&other));
        let vm = boot(
            machine(&memory, "other-flavour")?
                .disk_with(disk.path(), &kernel, &initrd)
                .cmdline(System::COMMAND_LINE)
                .cmdline("fstab=no memmap=1G$4G"),
        )?;
        diagnosed(
            &vm,
            &[
                &format!("the module is there for {release}, but the kernel that runs is {other}"),
                &format!("apt install linux-headers-{other}"),
            ],
        )?;
        removed(&vm)?;
        vm.shut_down()
    })
}

/// After their removal, nothing of the packages is left.
fn removed(vm: &Vm) -> Result<()> {
    vm.sh_for(
        "dpkg -L pmem-dkms pmemctl | sort -u >/tmp/files
         apt-get -y purge pmem-dkms pmemctl >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }",
        LONG,
    )?;
    let left = vm.sh(
        "while read file; do if test -f \"$file\" || test -L \"$file\"; then echo \"$file\"; fi; done </tmp/files
         ls -d /usr/src/pmem-* /var/lib/dkms/pmem* /var/cache/pmem* /lib/modules/*/updates/dkms/pmem* \
             /usr/lib/udev/rules.d/*pmem* 2>/dev/null || true",
    )?;
    ensure!(left.is_empty(), "left behind:\n{left}");
    Ok(())
}
