//! Memory of a tensor: a part of a mapped file or of the program, or its own.

#[cfg(unix)]
use memmap2::UncheckedAdvice;
use memmap2::{Mmap, MmapMut};
use std::ops::{Deref, Range};
use std::sync::Arc;

/// Bytes that tensors are cut from.
pub trait SharedBytes: Deref<Target = [u8]> + Send + Sync {
    /// Says that a range is not needed for now, so that it need not stay resident. It can still be read.
    fn release(&self, _range: Range<usize>) {}
}

impl SharedBytes for Vec<u8> {}

impl SharedBytes for &'static [u8] {}

impl SharedBytes for Mmap {
    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        // SAFETY: the mapping is read-only, so dropping its pages loses nothing: they are read from the file again.
        let advice = unsafe { self.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        // It is advice: where the system declines, memory is all that is lost.
        advice.ok();
    }
}

impl SharedBytes for MmapMut {}

/// Size of a huge page, of which smaller matrices would get none.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes that outlive every tensor cut from them: a mapped file, or part of the program.
pub type Bytes = Arc<dyn SharedBytes>;

/// The numbers of a tensor.
#[derive(Clone)]
pub(crate) enum Storage<T> {
    Owned(Arc<Vec<T>>),
    /// Memory of its own in huge pages, where the system grants them: large matrices are read faster from these.
    Huge(Arc<MmapMut>),
    Shared {
        bytes: Bytes,
        offset: usize,
        len: usize,
    },
}

impl<T: bytemuck::Pod> Storage<T> {
    pub(crate) fn new(bytes: &Bytes, offset: usize, len: usize) -> Self {
        let raw = &bytes[offset..offset + len];
        match bytemuck::try_cast_slice::<u8, T>(raw) {
            Ok(_) => Storage::Shared { bytes: bytes.clone(), offset, len },
            Err(_) => {
                let copy = Storage::Owned(Arc::new(bytemuck::pod_collect_to_vec(raw)));
                bytes.release(offset..offset + len);
                copy
            }
        }
    }

    /// Zeros, of a matrix that is written once.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        if bytes >= HUGE_PAGE
            && let Ok(memory) = MmapMut::map_anon(bytes)
        {
            // Advice: a kernel without huge pages is slower and nothing else.
            #[cfg(target_os = "linux")]
            memory.advise(memmap2::Advice::HugePage).ok();
            return Storage::Huge(Arc::new(memory));
        }
        Storage::Owned(Arc::new(vec![T::zeroed(); len]))
    }

    /// The numbers of a new storage.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        match self {
            Storage::Owned(values) => Arc::get_mut(values).expect("one owner"),
            Storage::Huge(memory) => bytemuck::cast_slice_mut(Arc::get_mut(memory).expect("one owner")),
            Storage::Shared { .. } => unreachable!("shared numbers are not written"),
        }
    }

    pub(crate) fn release(&self) {
        if let Storage::Shared { bytes, offset, len } = self {
            bytes.release(*offset..*offset + *len);
        }
    }

    /// A part, which shares its numbers with the whole where these are shared already.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        match self {
            Storage::Shared { bytes, offset, .. } => {
                let (start, end) = (range.start * size_of::<T>(), range.end * size_of::<T>());
                Storage::Shared { bytes: bytes.clone(), offset: offset + start, len: end - start }
            }
            whole => Storage::Owned(Arc::new(whole.as_slice()[range].to_vec())),
        }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        match self {
            Storage::Owned(values) => values,
            Storage::Huge(memory) => bytemuck::cast_slice(memory),
            Storage::Shared { bytes, offset, len } => bytemuck::cast_slice(&bytes[*offset..*offset + *len]),
        }
    }
}
