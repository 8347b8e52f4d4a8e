//! Run-time choice of the instruction set.
//!
//! A kernel is one generic body, inlined into a function for each instruction set.

use dibit_device::DeviceError;
use std::fmt;
use std::sync::OnceLock;

/// Instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// What the target guarantees.
    Baseline,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same with VNNI and VBMI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// The same with AMX for bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// NEON. The baseline has it too; here kernels use its instructions, there they are left to the compiler.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// The best one that this machine has.
    pub fn detect() -> Isa {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| *Isa::available().last().expect("the baseline is always there"))
    }

    /// All that this machine has, the best one last.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut all = vec![Isa::Baseline];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                all.push(Isa::Avx2);
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                if avx512 {
                    all.push(Isa::Avx512);
                    if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi") {
                        all.push(Isa::Avx512Vnni);
                        if super::amx_state::is_available() {
                            all.push(Isa::Amx);
                        }
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Isa::Neon);
        all
    }

    /// The one below those that have a unit for whole matrices.
    pub(crate) fn without_matrices(self) -> Isa {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512Vnni,
            other => other,
        }
    }

    /// Whether kernels fuse multiplication and addition.
    #[cfg(test)]
    pub(crate) fn fuses(self) -> bool {
        self != Isa::Baseline || BASELINE_FMA
    }

    /// The one of this name.
    ///
    /// # Errors
    /// [`DeviceError::Isa`] where this machine has none of this name.
    pub fn named(name: &str) -> Result<Isa, DeviceError> {
        Isa::available().into_iter().find(|isa| isa.name() == name).ok_or_else(|| DeviceError::Isa {
            name: name.to_owned(),
            available: Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", "),
        })
    }

    /// Its name: `scalar`, `avx2`, `avx512`, `avx512-vnni`, `amx` or `neon`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Baseline => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => "amx",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `a * b + c`: fused where the instruction set fuses, so that no library call is made where it does not.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// True where the target itself guarantees a fused multiply-add.
pub(crate) const BASELINE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// Defines `fn $name(isa, args)` that runs `$base`, `$avx2`, `$avx512`, `$vnni` or `$neon`: the same body with constants
/// for each. Without `$vnni`, `$avx512` takes its place.
macro_rules! dispatch {
    ($(#[$meta:meta])* fn $name:ident<$($generic:ident: $bound:path),*>($($arg:ident: $type:ty),* $(,)?)
     $(-> $out:ty)?; baseline: $base:expr; avx2: $avx2:expr; avx512: $avx512:expr; neon: $neon:expr;) => {
        $crate::simd::dispatch! {
            $(#[$meta])*
            fn $name<$($generic: $bound),*>($($arg: $type),*) $(-> $out)?;
            baseline: $base;
            avx2: $avx2;
            avx512: $avx512;
            vnni: $avx512;
            neon: $neon;
        }
    };
    ($(#[$meta:meta])* fn $name:ident<$($generic:ident: $bound:path),*>($($arg:ident: $type:ty),* $(,)?)
     $(-> $out:ty)?; baseline: $base:expr; avx2: $avx2:expr; avx512: $avx512:expr; vnni: $vnni:expr;
     neon: $neon:expr;) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name<$($generic: $bound),*>(isa: $crate::simd::Isa, $($arg: $type),*) $(-> $out)? {
            use $crate::simd::Isa;
            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments)]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$($generic: $bound),*>($($arg: $type),*) $(-> $out)? {
                $avx2
            }
            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments)]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512<$($generic: $bound),*>($($arg: $type),*) $(-> $out)? {
                $avx512
            }
            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments)]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
            fn vnni<$($generic: $bound),*>($($arg: $type),*) $(-> $out)? {
                $vnni
            }
            match isa {
                Isa::Baseline => $base,
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` reaches kernels through a `Cpu`, which takes none that `Isa::available` lacks.
                Isa::Avx2 => unsafe { avx2::<$($generic),*>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx512 => unsafe { avx512::<$($generic),*>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx512Vnni | Isa::Amx => unsafe { vnni::<$($generic),*>($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => $neon,
            }
        }
    };
}
pub(crate) use dispatch;
