// SPDX-License-Identifier: GPL-2.0-only

//! String parameters of modules, readable in sysfs.
//!
//! The kernel crate's `module!` has integer and boolean parameters, which are not in sysfs.
//!
//! C header: [`include/linux/moduleparam.h`](srctree/include/linux/moduleparam.h)

use super::bindings;
use core::cell::UnsafeCell;
use kernel::prelude::*;

/// The value of a string parameter, declared with [`string_params!`].
///
/// # Invariants
///
/// Points to a NUL-terminated string that is valid until the module is gone.
#[repr(transparent)]
pub(crate) struct StringParam(UnsafeCell<*mut c_char>);

// SAFETY: `param_ops_charp` changes the value only while the module is loaded or the kernel boots,
// both before `init()`: the parameters are read-only in sysfs. From then on it is only read.
unsafe impl Sync for StringParam {}

impl StringParam {
    #[doc(hidden)]
    pub(crate) const fn new(default: &'static CStr) -> Self {
        // INVARIANT: A `'static` string, which C does not write to. `param_set_charp()` frees an
        // old value only if it has allocated it.
        StringParam(UnsafeCell::new(
            kernel::str::as_char_ptr_in_const_context(default).cast_mut(),
        ))
    }

    /// The text that was given, or the default.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is not UTF-8.
    pub(crate) fn get(&self) -> Result<&str> {
        // SAFETY: By the type invariant; nobody writes after `init()` has begun.
        let value = unsafe { CStr::from_char_ptr(*self.0.get()) };
        Ok(value.to_str()?)
    }

    #[doc(hidden)]
    pub(crate) const fn arg(&self) -> bindings::kernel_param__bindgen_ty_1 {
        bindings::kernel_param__bindgen_ty_1 {
            arg: self.0.get().cast(),
        }
    }
}

/// Declares string parameters, and what `modinfo` says of them.
///
/// The module's name comes first: it is the prefix on the kernel's command line when the module is
/// built in.
macro_rules! string_params {
    ($module:literal; $($(#[$doc:meta])* $static:ident: $name:literal = $default:expr, $about:literal;)*) => {$(
        $(#[$doc])*
        pub(crate) static $static: $crate::kapi::param::StringParam =
            $crate::kapi::param::StringParam::new($default);

        const _: () = {
            #[link_section = "__param"]
            #[used(compiler)]
            static PARAM: ::kernel::module_param::KernelParam =
                ::kernel::module_param::KernelParam::new(::kernel::bindings::kernel_param {
                    name: ::kernel::str::as_char_ptr_in_const_context(if cfg!(MODULE) {
                        $crate::kapi::param::c_str(concat!($name, "\0"))
                    } else {
                        $crate::kapi::param::c_str(concat!($module, ".", $name, "\0"))
                    }),
                    mod_: <$crate::LocalModule as $crate::kapi::compat::ModuleMetadata>::THIS_MODULE.as_ptr(),
                    ops: $crate::kapi::param::OPS,
                    perm: 0o444,
                    level: -1,
                    flags: 0,
                    __bindgen_anon_1: $static.arg(),
                });

            $crate::kapi::param::modinfo!($module, concat!("parmtype=", $name, ":charp\0"));
            $crate::kapi::param::modinfo!($module, concat!("parm=", $name, ":", $about, "\0"));
        };
    )*};
}
pub(crate) use string_params;

/// Puts a string into the section that `modinfo` reads.
macro_rules! modinfo {
    ($module:literal, $text:expr) => {
        const _: () = {
            const TEXT: &str = if cfg!(MODULE) {
                $text
            } else {
                concat!($module, ".", $text)
            };
            #[link_section = ".modinfo"]
            #[used(compiler)]
            static INFO: [u8; TEXT.len()] = $crate::kapi::param::bytes(TEXT);
        };
    };
}
pub(crate) use modinfo;

#[doc(hidden)]
pub(crate) const OPS: *const bindings::kernel_param_ops =
    core::ptr::addr_of!(bindings::param_ops_charp);

// These two are called at build time alone, where a panic is an error of the build.

#[doc(hidden)]
pub(crate) const fn c_str(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(s) => s,
        Err(_) => panic!("a parameter's name holds a NUL"),
    }
}

#[doc(hidden)]
pub(crate) const fn bytes<const LEN: usize>(text: &str) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let mut i = 0;
    while i < LEN {
        bytes[i] = text.as_bytes()[i];
        i += 1;
    }
    bytes
}
